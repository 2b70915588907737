"""Do generated images help a classifier? From its answers on test images, with and without them.

Each arm, a set of training images, has S classifiers of S seeds; `answers` [S, N] are the classes that they give N test
images. Everything is by class: balanced accuracy is the mean of the recalls. Its variance is that over seeds, and in
each class that over test images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ncsn.core.keyed_random import COMMON_SEED
from ncsn.data.format import Manifest
from ncsn.errors import UserError
from ncsn.evaluation import with_interval

SURE = 0.05  # chance that an interval misses the truth
LEAST_OF_CLASS = 2  # images to train on, and to test with
NAMED_IMAGES = 20  # test images of a class from which it may be named

Answers = NDArray[np.int64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A figure in percent, or a difference of two in points, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return with_interval(self.value, self.low, self.high)


@dataclass(frozen=True)
class Figures:
    """What one arm reaches."""

    balanced_accuracy: Estimate
    accuracy: Estimate
    macro_f1: Estimate
    recalls: list[Estimate]  # of each class


@dataclass(frozen=True)
class Comparison:
    """The one comparison: the arm of the best ratio against the one without generated images, by cross-fitting."""

    gain: Estimate  # in balanced accuracy
    chosen: tuple[str, str]  # the arm that is best on either half, and judged by the other
    classes: list[Estimate]  # the gain in each class, with the interval of this class alone
    named: list[int]  # classes whose gain is surely not zero, by Holm over all, the largest first

    @property
    def grade(self) -> str:
        """`helps`, `harms` or `same`."""
        return "helps" if self.gain.low > 0 else "harms" if self.gain.high < 0 else "same"


def require_enough(manifest: Manifest) -> None:
    """Refuse images with which the question has no answer: of one class, or with a class of hardly any images."""
    names = manifest.class_names
    if len(names) < 2:
        reason = f"needs images of two classes or more, and {manifest.name} has {len(names)}"
        raise UserError("utility", reason, hint="sort the images into one subfolder per class, or use null")
    for name, train, test in zip(names, *(manifest.class_counts[split] for split in ("train", "test")), strict=True):
        if min(train, test) < LEAST_OF_CLASS:
            reason = f"needs {LEAST_OF_CLASS} training and test images of each class; {name!r} has {train} and {test}"
            raise UserError("utility", reason, hint="add more, name it in data.leave_out, or use null")


def figures(answers: Answers, labels: Labels, *, num_classes: int) -> Figures:
    """Of one arm."""
    right, every = (answers == labels).astype(float), np.zeros_like(labels)
    found = [_mean_over_classes(right, labels), _mean_over_classes(right, every)]
    found.append(_macro_f1(answers, labels, num_classes))
    found += [_mean_over_classes(right[:, own], labels[own]) for own in _by_class(labels, num_classes)]
    estimates = (_estimate(*each) for each in found)
    balanced, accuracy, f1, *recalls = (Estimate(e.value, max(e.low, 0.0), min(e.high, 100.0)) for e in estimates)
    return Figures(balanced, accuracy, f1, recalls)


def compare(without: Answers, ratios: Mapping[str, Answers], labels: Labels, *, num_classes: int) -> Comparison:
    """Compare the arms of all `ratios` with the one `without`.

    The test images of each class fall into two halves. The arm that is best on one half is judged by the other, and the
    gain is the mean of both, so no image judges what it has chosen.
    """
    first, names = _first_half(labels, num_classes), list(ratios)
    rights = {name: (answers == labels).astype(float) for name, answers in ratios.items()}
    chosen = []
    for half in (first, ~first):
        scores = [_mean_over_classes(rights[name][:, half], labels[half])[0].mean() for name in names]
        chosen.append(names[int(np.argmax(scores))])  # of equal ones the first, with the fewest images
    right = np.where(first, rights[chosen[1]], rights[chosen[0]])
    gain = right - (without == labels)
    by_class = [_mean_over_classes(gain[:, own], labels[own]) for own in _by_class(labels, num_classes)]
    return Comparison(
        gain=_estimate(*_mean_over_classes(gain, labels)),
        chosen=(chosen[0], chosen[1]),
        classes=[_estimate(*each) for each in by_class],
        named=_holm(by_class, np.bincount(labels, minlength=num_classes)),
    )


def _by_class(labels: Labels, num_classes: int) -> list[NDArray[np.bool_]]:
    return [labels == label for label in range(num_classes)]


def _first_half(labels: Labels, num_classes: int) -> NDArray[np.bool_]:
    """Whether a test image is in the first half of its class, drawn once for a test split."""
    order, first = np.random.default_rng(COMMON_SEED).permutation(len(labels)), np.zeros(len(labels), bool)
    for own in _by_class(labels[order], num_classes):
        first[order[np.flatnonzero(own)[::2]]] = True
    return first


def _mean_over_classes(values: NDArray[np.float64], labels: Labels) -> tuple[NDArray[np.float64], float]:
    """Mean over classes of the mean over their images of `values` [S, N]: of each seed, and its variance over images.

    Where hardly any image differs, those that were not seen may: the variance is as if one more had, in any class.
    """
    means, variance, present = [], 0.0, np.unique(labels)
    for label in present:
        own = values[:, labels == label]
        count, of_images = own.shape[1], own.mean(axis=0)
        means.append(own.mean(axis=1))
        squares = ((of_images - of_images.mean()) ** 2).sum() + 1 / len(present)
        variance += squares / max(count - 1, 1) / count / len(present) ** 2
    return np.mean(means, axis=0), float(variance)


def _estimate(of_seeds: NDArray[np.float64], variance: float) -> Estimate:
    """The mean over seeds in percent; its variance is that of the seeds and that over images."""
    from scipy.stats import t  # here, so that commands that judge nothing do not load it

    count, value = len(of_seeds), 100 * float(of_seeds.mean())
    reach = 100 * float(t.ppf(1 - SURE / 2, count - 1)) * _deviation(of_seeds, variance)
    return Estimate(value, value - reach, value + reach)


def _deviation(of_seeds: NDArray[np.float64], variance: float) -> float:
    return float(np.sqrt(of_seeds.var(ddof=1) / len(of_seeds) + variance))


def _macro_f1(answers: Answers, labels: Labels, num_classes: int) -> tuple[NDArray[np.float64], float]:
    """Mean over classes of F1 = 2 TP / D, D = 2 TP + FP + FN; its variance over images is that of its derivative."""
    of_seeds, change = [], np.zeros(len(labels))  # of the mean over seeds by one more of an image
    for given in answers:
        hits = np.bincount(labels[given == labels], minlength=num_classes)
        all_of = np.maximum(np.bincount(labels, minlength=num_classes) + np.bincount(given, minlength=num_classes), 1)
        f1 = 2 * hits / all_of
        of_seeds.append(f1.mean())
        lost, slope = f1 / all_of, 2 / all_of
        own = np.where(given == labels, slope[labels] - 2 * lost[labels], -lost[labels] - lost[given])
        change += own / num_classes / len(answers)
    spread = [change[own] for own in _by_class(labels, num_classes)]
    return np.array(of_seeds), float(sum(len(each) * each.var(ddof=1) for each in spread))


def _holm(by_class: Sequence[tuple[NDArray[np.float64], float]], counts: NDArray[np.int64]) -> list[int]:
    """Classes whose mean is surely not zero, by Holm's procedure over all of them, and that have enough images."""
    from scipy.stats import t

    means = np.array([of_seeds.mean() for of_seeds, _ in by_class])
    sizes = np.abs(means) / [_deviation(*each) for each in by_class]
    chances = 2 * t.sf(sizes, len(by_class[0][0]) - 1)
    sure = []
    for rank, label in enumerate(np.argsort(chances)):
        if chances[label] > SURE / (len(chances) - rank):
            break
        sure.append(int(label))
    return sorted((each for each in sure if counts[each] >= NAMED_IMAGES), key=lambda each: -abs(means[each]))
