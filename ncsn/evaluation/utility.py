"""Do generated images help a classifier? From its answers on test images, with and without them.

Each arm, a set of training images, has S classifiers of S seeds; `answers` [S, N] are the classes that they give N test
images. Figures are in percent. Everything is by class: balanced accuracy is the mean of the recalls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ncsn.core.keyed_random import COMMON_SEED
from ncsn.data.format import Manifest
from ncsn.errors import UserError
from ncsn.runs.metrics import Estimate
from ncsn.runs.results import Arm

SURE = 0.05  # chance that an interval misses the truth
LEAST_OF_CLASS = 2  # images to train on, and to test with
UNBALANCED = 1.5  # the largest class over the smallest, from which arms balance them
NAMED_IMAGES = 20  # test images of a class from which it may be named

Numbers: TypeAlias = NDArray[np.int64]
_Mean: TypeAlias = tuple[NDArray[np.float64], float]  # of each seed, and its variance over test images


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


def unbalanced(counts: Sequence[float] | Numbers) -> bool:
    """Whether classes of these numbers of training images are to be balanced."""
    return bool(max(counts) > UNBALANCED * min(counts))


def arm_of(name: str, answers: Numbers, labels: Numbers, *, num_classes: int, real: int = 0, generated: int = 0) -> Arm:
    """How good the classifiers of an arm are, which pass so many `real` and `generated` images."""
    right = (answers == labels).astype(float)
    return Arm(
        name=name,
        real=real,
        generated=generated,
        balanced_accuracy=_estimate(_mean(right, labels), least=0),
        accuracy=_estimate(_mean(right), least=0),
        macro_f1=_estimate(_macro_f1(answers, labels, num_classes), least=0),
        recalls=[_estimate(_mean(right[:, labels == label]), least=0) for label in range(num_classes)],
    )


@dataclass(frozen=True)
class Comparison:
    """What the one comparison says of generated images."""

    grade: str  # helps, harms or same
    gain: Estimate  # in balanced accuracy
    chosen: list[str]  # the arms that were judged, the most often chosen first
    classes: list[Estimate]  # the gain in each
    named: list[int]  # classes whose gain is surely not zero, by Holm over all, largest first


def compare(without: Numbers, ratios: Mapping[str, Numbers], labels: Numbers, *, num_classes: int) -> Comparison:
    """The one comparison: the arm of the best of all `ratios` against the one `without` generated images.

    The test images of each class fall into two halves. What classifiers of one seed answer on one half is judged for
    the arm that is best on the other half by all other seeds: neither images nor classifiers judge what they chose.
    """
    first, names, seeds = _first_half(labels), [*ratios], np.arange(len(without))
    rights = np.stack([(answers == labels) * 1.0 for answers in ratios.values()])
    scores = np.array([[_mean(right[:, half], labels[half])[0] for right in rights] for half in (first, ~first)])
    best = (scores.sum(axis=2, keepdims=True) - scores).argmax(axis=1)  # [halves, seeds]; of equal ones the first
    gain = np.where(first, rights[best[1], seeds], rights[best[0], seeds]) - (without == labels)
    by_class = [_mean(gain[:, labels == label]) for label in range(num_classes)]
    whole = _estimate(_mean(gain, labels))
    return Comparison(
        grade="helps" if whole.low > 0 else "harms" if whole.high < 0 else "same",
        gain=whole,
        chosen=[names[arm] for arm, _ in Counter(best.ravel().tolist()).most_common()],
        classes=[_estimate(each) for each in by_class],
        named=_surely(by_class, np.bincount(labels, minlength=num_classes)),
    )


def _first_half(labels: Numbers) -> NDArray[np.bool_]:
    """Whether a test image is in the first half of its class, drawn once for a test split."""
    order, first = np.random.default_rng(COMMON_SEED).permutation(len(labels)), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        first[order[labels[order] == label][::2]] = True
    return first


def _mean(values: NDArray[np.float64], labels: Numbers | None = None) -> _Mean:
    """The mean over classes of the mean over their images of `values` [S, N]; without labels all are of one class.

    Where hardly any image differs, those that were not seen may: the variance is as if one more had, in any class.
    """
    labels = np.zeros(values.shape[1], np.int64) if labels is None else labels
    means, variance, present = [], 0.0, np.unique(labels)
    for label in present:
        own = values[:, labels == label]
        count, of_images = own.shape[1], own.mean(axis=0)
        means.append(own.mean(axis=1))
        squares = ((of_images - of_images.mean()) ** 2).sum() + 1 / len(present)
        variance += squares / max(count - 1, 1) / count / len(present) ** 2
    return np.mean(means, axis=0), float(variance)


def _macro_f1(answers: Numbers, labels: Numbers, num_classes: int) -> _Mean:
    """Mean over classes of F1 = 2 TP / D, D = 2 TP + FP + FN; its variance over images is that of its derivative."""
    of_seeds, change = [], np.zeros(len(labels))  # of the mean over seeds by one more of an image
    count = np.bincount(labels, minlength=num_classes)
    for given in answers:
        d = np.maximum(count + np.bincount(given, minlength=num_classes), 1)
        f1 = 2 * np.bincount(labels[given == labels], minlength=num_classes) / d
        of_seeds.append(f1.mean())
        lost, slope = f1 / d, 2 / d
        own = np.where(given == labels, slope[labels] - 2 * lost[labels], -lost[labels] - lost[given])
        change += own / num_classes / len(answers)
    one_more = (1 / np.maximum(count - 1, 1) / np.maximum(count, 1)).sum() / num_classes**3  # as in `_mean`
    variance = one_more + sum(count[label] * change[labels == label].var(ddof=1) for label in range(num_classes))
    return np.array(of_seeds), float(variance)


def _deviation(mean: _Mean) -> float:
    return float(np.sqrt(mean[0].var(ddof=1) / len(mean[0]) + mean[1]))


def _estimate(mean: _Mean, *, least: float = -100.0) -> Estimate:
    """The mean over seeds in percent, from `least` to 100, with Student's t of one less than seeds."""
    from scipy.stats import t  # here, so that commands that judge nothing do not load it

    value, reach = float(mean[0].mean()), float(t.ppf(1 - SURE / 2, len(mean[0]) - 1)) * _deviation(mean)
    ends = (100 * value, 100 * (value - reach), 100 * (value + reach))
    return Estimate(*(min(max(end, least), 100.0) for end in ends))


def _surely(by_class: list[_Mean], counts: Numbers) -> list[int]:
    """Classes whose mean is surely not zero, by Holm's procedure over all of them, and that have enough images."""
    from scipy.stats import t

    values = np.array([of_seeds.mean() for of_seeds, _ in by_class])
    chances = 2 * t.sf(np.abs(values) / [*map(_deviation, by_class)], len(by_class[0][0]) - 1)
    sure = []
    for rank, label in enumerate(np.argsort(chances)):
        if chances[label] > SURE / (len(chances) - rank):
            break
        sure.append(int(label))
    return sorted((each for each in sure if counts[each] >= NAMED_IMAGES), key=lambda each: -abs(values[each]))
