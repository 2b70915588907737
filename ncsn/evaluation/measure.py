"""All metrics of a set of images against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ncsn.config import Config
from ncsn.core.keyed_random import COMMON_SEED, keyed_permutation
from ncsn.data.training_images import open_cache
from ncsn.evaluation import DEVIATIONS, WITH_SCORE, classes_in_turn
from ncsn.evaluation.extractors import Extracted
from ncsn.evaluation.features import ImageSet, Runner, SplitSet, extract_set
from ncsn.evaluation.frechet import RunningDistance, RunningScore, score_of
from ncsn.evaluation.reference import Evaluator, Reference, class_histogram, load_reference
from ncsn.evaluation.scores import excess_distance, inception_score, kernel_distance, precision_recall
from ncsn.progress import Progress
from ncsn.runs.metrics import metric_name

if TYPE_CHECKING:
    from ncsn.evaluation.class_scores import ClassScores, RequestedClasses

# Images for precision, recall, density and coverage; the cost grows with the square.
FEWEST_BALLS, BALL_IMAGES = 6, 10_000


@dataclass(frozen=True)
class Metric:
    """A value and the number of images that it is of."""

    value: float
    num_images: int


@dataclass(frozen=True)
class Measured:
    """One set of images, measured."""

    metrics: dict[str, Metric]  # by short name
    running: list[RunningScore]
    equal: dict[str, Metric]  # what depends on the number of images, of as many as the smallest set has
    classes: ClassScores | None = None  # of images with classes that were asked for

    def named(self, extractor: str, *, real: bool = False) -> dict[str, float]:
        """Full metric name -> value."""
        return {
            metric_name(name, extractor=extractor, num_images=metric.num_images, real=real): metric.value
            for name, metric in (*self.metrics.items(), *self.equal.items())
        }


def measure_extracted(
    extracted: Extracted,
    *,
    reference: Reference,
    num_splits: int,
    classes: bool = True,
    requested: RequestedClasses | None = None,
    num_compared: int | None = None,
    in_turn: int = 1,
    early: bool = True,
) -> Measured:
    """All metrics of images, given their features.

    They are those of `feature_metrics`, `class_metrics` and `ClassScores`.

    Args:
        extracted: Features and probabilities of the images, in order.
        num_splits: Of the score.
        classes: Whether the extractor's classes mean something; without, there is no score.
        requested: The classes of the images; None for a model without.
        num_compared: Images of the smallest set that these are compared with; None for as many as these. Scores of
            more images, which depend on their number, are only of samples.
        in_turn: How many classes the images show in turn.
        early: Whether they are samples, with running scores of fewer images than all.
    """
    count = len(extracted.features)
    fewest = min(count, num_compared or count)
    most = count if early else fewest
    if early:
        scores = RunningDistance(reference.statistics, count=most, classes_in_turn=in_turn).add(0, extracted.features)
    else:
        scores = [score_of(extracted.features[:most], reference.statistics, classes_in_turn=in_turn)]
    compared = scores[-1]
    if fewest < most:
        compared = score_of(extracted.features[:fewest], reference.statistics, classes_in_turn=in_turn)
    equal = {name: Metric(value, fewest) for name, value in compared.values.items()}
    metrics = feature_metrics(extracted, reference, distance=scores[-1], balls=fewest, in_turn=in_turn)
    if classes:
        probabilities = extracted.log_probabilities
        metrics |= class_metrics(probabilities[:most], reference, num_splits=num_splits)
        equal |= class_metrics(probabilities[:fewest], reference, num_splits=num_splits)
    found = None if requested is None else requested.scores(extracted, reference=reference.features, seed=COMMON_SEED)
    if found is not None:
        metrics |= {name: Metric(value, found.count) for name, value in found.metrics.items()}
    return Measured(metrics=metrics, running=scores, equal=equal, classes=found)


def feature_metrics(
    extracted: Extracted, reference: Reference, *, distance: RunningScore, balls: int, in_turn: int
) -> dict[str, Metric]:
    """Metrics of features by short name.

    - `fid`: Fréchet distance to all reference images: `distance`.
    - `kid`: kernel distance, over 100 subsets of at most 1,000 images.
    - `fid_low`, `fid_high`, `kid_low`, `kid_high`: their 95 % intervals, by the jackknife over the images.
    - `precision`, `recall`, `density`, `coverage`: of the first `balls` images against as many reference images, at
      most 10,000.
    """
    count = len(extracted.features)
    kid, kid_std = kernel_distance(extracted.features, reference.features, seed=COMMON_SEED, classes_in_turn=in_turn)
    values = {"kid": kid, "kid_low": kid - DEVIATIONS * kid_std, "kid_high": kid + DEVIATIONS * kid_std}
    metrics = {name: Metric(value, count) for name, value in values.items()}
    metrics |= {name: Metric(value, distance.num_images) for name, value in distance.values.items()}
    balls = min(balls, len(reference.features), BALL_IMAGES)
    if balls >= FEWEST_BALLS:
        chosen = np.sort(keyed_permutation(COMMON_SEED, epoch=0, size=len(reference.features))[:balls])
        shares = precision_recall(extracted.features[:balls], reference.features[chosen])
        metrics |= {name: Metric(value, balls) for name, value in shares.items()}
    return metrics


def class_metrics(
    log_probabilities: npt.NDArray[np.float64], reference: Reference, *, num_splits: int
) -> dict[str, Metric]:
    """Metrics of the probabilities [N, K] of classes by short name.

    - `score`, `score_std`: the Inception-score formula over contiguous splits.
    - `class_tv`: total-variation distance in [0, 1] of the histograms of most probable classes.
    - `confidence`: mean largest class probability.
    """
    score, score_std = inception_score(log_probabilities, num_splits=num_splits)
    difference = class_histogram(log_probabilities) - reference.class_histogram
    values = {
        "score": score,
        "score_std": score_std,
        "class_tv": float(0.5 * np.abs(difference).sum()),
        "confidence": float(np.exp(log_probabilities.max(axis=1)).mean()),
    }
    return {name: Metric(value, len(log_probabilities)) for name, value in values.items()}


# A set with its features, the images of the smallest set, the extractor and the URI of the reference; and of samples,
# which are the first set, the features of the real images.
_Work = tuple[Config, str, ImageSet, Extracted, int, str, str, npt.NDArray[np.floating] | None]


def measure_sets(
    config: Config, dataset: str, evaluator: Evaluator, sets: Sequence[ImageSet], *, runner: Runner, progress: Progress
) -> list[Measured]:
    """All metrics of each of two sets, running scores and the excess of the first; `progress` counts the images.

    `excess` is that of samples over real images, as a share of the distance `Reference.gaussian`.
    """
    extractor, reference = evaluator.extractor, evaluator.reference.uri
    fewest = min(images.count for images in sets)
    samples, real = [extract_set(config, dataset, images, runner=runner, progress=progress) for images in sets]
    order = mixed_order(config, sets[0].count)  # so that the first of them, and each split, are of all classes
    samples = Extracted(samples.features[order], samples.log_probabilities[order])
    works: list[_Work] = [
        (config, dataset, sets[0], samples, fewest, extractor, reference, real.features),
        (config, dataset, sets[1], real, fewest, extractor, reference, None),
    ]
    found = {work[2]: result for work, result in runner(_measure_set, works, gpu=False)}
    return [found[images] for images in sets]


def mixed_order(config: Config, count: int) -> slice | npt.NDArray[np.int64]:
    """The order in which samples are measured: their own, or a shuffled one if they come class by class."""
    by_class = isinstance(config.sampling.label, dict)
    return keyed_permutation(COMMON_SEED, epoch=0, size=count) if by_class else slice(None)


def _measure_set(work: _Work) -> Measured:
    config, dataset, images, extracted, fewest, extractor, uri, real = work
    reference = load_reference(uri)
    assert reference is not None, "the evaluator has it"
    requested, num_classes = None, config.data.num_classes
    # The extractor has seen the classes of training images, so these say nothing beside the samples.
    if num_classes is not None and not (isinstance(images, SplitSet) and images.split == "train"):
        from ncsn.evaluation.class_scores import (
            RequestedClasses,  # here, so that a run without classes does not load it
        )

        known = open_cache(dataset, config.evaluation.reference_split, as_bytes=True).labels
        labels = images.labels() if real is None else images.labels()[mixed_order(config, images.count)]
        requested = RequestedClasses(labels, known, num_classes, own=extractor == "classifier")
    in_turn = 1 if isinstance(images, SplitSet) else classes_in_turn(config)
    measured = measure_extracted(
        extracted,
        reference=reference,
        num_splits=config.evaluation.num_splits,
        classes=extractor in WITH_SCORE,
        requested=requested,
        num_compared=fewest,
        in_turn=in_turn,
        early=real is not None,
    )
    if real is not None:
        excess, std = excess_distance(extracted.features, real, reference.features, classes_in_turn=in_turn)
        low, high = excess - DEVIATIONS * std, excess + DEVIATIONS * std
        for name, value in (("excess", excess), ("excess_low", low), ("excess_high", high)):
            measured.metrics[name] = Metric(value / reference.gaussian, len(extracted.features))
    return measured
