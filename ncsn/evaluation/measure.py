"""All metrics of a set of images against a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ncsn import storage
from ncsn.config import Config
from ncsn.config.evaluation import EXTRAPOLATE_RATIO
from ncsn.core.keyed_random import keyed_permutation
from ncsn.data.training_images import open_cache
from ncsn.evaluation.choice import classes_in_turn
from ncsn.evaluation.classes import AskedClasses, ClassScores, asked_classes, class_scores
from ncsn.evaluation.extractors.base import Extracted, Identity, Images
from ncsn.evaluation.frechet import (
    FrechetStatistics,
    RunningDistance,
    RunningScore,
    frechet_distance,
    frechet_infinity,
    frechet_jackknife,
    merged,
)
from ncsn.evaluation.pieces import FeaturePiece, ImageSet, SplitSet, Spool, extract_piece, feature_pieces
from ncsn.evaluation.reference import (
    SEED,
    Evaluator,
    Reference,
    class_histogram,
    extractor_of,
    load_reference,
    store_pieces,
)
from ncsn.evaluation.runner import Runner
from ncsn.evaluation.scores import Neighbors, inception_score, kernel_distance, nearest_neighbors, precision_recall
from ncsn.storage.cache import cache_folder

# Images for precision, recall, density and coverage; the cost grows with the square.
FEWEST_BALLS, BALL_IMAGES = 6, 10_000
NEIGHBOR_IMAGES = 256  # nearest training images are sought of these
SHOWN_NEIGHBORS = 16  # nearest training images are listed of these


@dataclass(frozen=True)
class Metric:
    """A value and the number of images that it is of."""

    value: float
    num_images: int


@dataclass(frozen=True)
class Measured:
    """One set of images, measured."""

    metrics: dict[str, Metric]  # by short name
    nearest: list[dict[str, Any]]  # training images of the first 16 images, as `_neighbor_table` lists them
    running: list[RunningScore]
    classes: ClassScores | None = None  # of images with classes that were asked for

    def value(self, metric: str) -> float:
        """The value of the metric of that short name."""
        return self.metrics[metric].value

    def named(self, extractor: str, *, real: bool = False) -> dict[str, float]:
        """Full metric name -> value."""
        return {
            metric_name(name, extractor=extractor, num_images=metric.num_images, real=real): metric.value
            for name, metric in self.metrics.items()
        }


def metric_name(metric: str, *, extractor: str, num_images: int, real: bool = False) -> str:
    """`eval/classifier_fid_n512`, or `eval/real_classifier_fid_n512` for real test images."""
    return f"eval/{'real_' if real else ''}{extractor}_{metric}_n{num_images}"


def measure_extracted(
    extracted: Iterable[Extracted],
    *,
    count: int,
    first_images: Images,
    reference: Reference,
    training_images: Images,
    num_splits: int,
    seed: int,
    classes: bool = True,
    asked: AskedClasses | None = None,
    in_turn: int = 1,
    extrapolate: bool = False,
    by_features: bool = True,
    on_score: Callable[[RunningScore], None] | None = None,
) -> Measured:
    """All metrics of images, given their features, which go to files so that memory does not grow with their number.

    Args:
        extracted: Features and probabilities of the `count` images, in order, in pieces of any size.
        first_images: The first 256 of them, or all if there are fewer, [n, H, W, C] uint8; for training images as
            many test images instead.
        training_images: Of the dataset, [N, H, W, C] uint8; a memory map is fine.
        num_splits: Of the score.
        seed: Of the subsets that are drawn.
        classes: Whether the extractor's classes mean something; without, there is no score.
        asked: The classes of the images; None for a model without.
        in_turn: How many classes the images show in turn.
        extrapolate: Whether to extrapolate the Fréchet distance, if there are enough images.
        by_features: Whether the reference is the training images, so that the nearest by features are shown.
    """
    running, scores = RunningDistance(reference.statistics, count=count, classes_in_turn=in_turn), []
    with storage.scratch_folder(str(cache_folder())) as folder:
        spool = Spool(folder, count=count)
        for piece in extracted:
            spool.add(piece)
            # From mark to mark, so that the last bits do not depend on the pieces.
            while running.count < running.next_mark <= spool.done:
                block = spool.extracted.features[running.count : running.next_mark]
                for score in running.add(running.count, block):
                    scores.append(score)
                    if on_score is not None:
                        on_score(score)
        whole = spool.extracted
        metrics = feature_metrics(whole, reference, groups=running.groups, seed=seed, extrapolate=extrapolate)
        if classes:
            metrics |= class_metrics(whole.log_probabilities, reference, num_splits=num_splits)
        found = None if asked is None else class_scores(whole, asked, reference=reference.features, seed=seed)
        features = None
        if by_features:
            features = nearest_neighbors(whole.features[:SHOWN_NEIGHBORS], reference.features, k=2)
    pixels = pixel_neighbors(first_images, training_images)
    nearest = _neighbor_table(pixels=pixels, features=features)
    metrics |= _neighbor_metrics(pixels)
    if found is not None:
        metrics |= {name: Metric(value, found.count) for name, value in found.metrics.items()}
    return Measured(metrics=metrics, nearest=nearest, running=scores, classes=found)


def feature_metrics(
    extracted: Extracted,
    reference: Reference,
    *,
    groups: Sequence[FrechetStatistics],
    seed: int,
    extrapolate: bool = False,
) -> dict[str, Metric]:
    """Metrics of features by short name.

    - `fid`, `fid_std`: Fréchet distance to all reference images, and its uncertainty by the jackknife over `groups`,
      the moments of the features in disjoint groups.
    - `fid_infinity`, `fid_infinity_std`: of infinitely many images, if asked for and there are enough.
    - `kid`, `kid_std`: kernel distance, over 100 subsets of at most 1,000 images.
    - `precision`, `recall`, `density`, `coverage`: against as many reference images, at most 10,000.
    """
    count, size = extracted.features.shape
    distance = frechet_distance(merged(groups), reference.statistics)
    std = frechet_jackknife(groups, reference.statistics)
    kernel = kernel_distance(extracted.features, reference.features, seed=seed)
    values = {"fid": distance, "fid_std": std, "kid": kernel.mean, "kid_std": kernel.std}
    if extrapolate and count >= EXTRAPOLATE_RATIO * size:
        limit = frechet_infinity(extracted.features, reference.statistics, std=std, seed=seed)
        values |= {"fid_infinity": limit.mean, "fid_infinity_std": limit.std}
    return {name: Metric(value, count) for name, value in values.items()} | _balls(extracted, reference, seed=seed)


def class_metrics(
    log_probabilities: npt.NDArray[np.float64], reference: Reference, *, num_splits: int
) -> dict[str, Metric]:
    """Metrics of the probabilities [N, K] of classes by short name.

    - `score`, `score_std`: the Inception-score formula over contiguous splits.
    - `class_tv`: total-variation distance in [0, 1] of the histograms of most probable classes.
    - `confidence`: mean largest class probability.
    """
    score = inception_score(log_probabilities, num_splits=num_splits)
    difference = class_histogram(log_probabilities) - reference.class_histogram
    values = {
        "score": score.mean,
        "score_std": score.std,
        "class_tv": float(0.5 * np.abs(difference).sum()),
        "confidence": float(np.exp(log_probabilities.max(axis=1)).mean()),
    }
    return {name: Metric(value, len(log_probabilities)) for name, value in values.items()}


def pixel_neighbors(images: Images, training_images: Images) -> Neighbors:
    """The two nearest training images, by Euclidean distance of pixels in 0..255, of at most 256 images."""
    return nearest_neighbors(images[:NEIGHBOR_IMAGES], training_images, k=2)


def _neighbor_metrics(neighbors: Neighbors) -> dict[str, Metric]:
    """`memorised`, the share of images that copy a training image, and `nn_distance`.

    `nn_distance` is the median distance to the nearest training image in pixel units of 0..255. A value well below that
    of real test images means that the model repeats its training images.
    """
    count = len(neighbors.distances)
    return {
        "memorised": Metric(float(neighbors.memorized.mean()), count),
        "nn_distance": Metric(float(np.median(neighbors.distances[:, 0])), count),
    }


def _neighbor_table(*, pixels: Neighbors, features: Neighbors | None) -> list[dict[str, Any]]:
    """Of the first 16 images: the nearest rows of the train split by pixels and by features, nearest first."""
    spaces = {"pixels": pixels} if features is None else {"pixels": pixels, "features": features}
    return [
        {
            "image": row,
            "memorised": bool(pixels.memorized[row]),
            **{f"{name}_rows": found.indices[row].tolist() for name, found in spaces.items()},
            **{f"{name}_distances": found.distances[row].round(3).tolist() for name, found in spaces.items()},
        }
        for row in range(min(SHOWN_NEIGHBORS, len(pixels.indices)))
    ]


def _balls(extracted: Extracted, reference: Reference, *, seed: int) -> dict[str, Metric]:
    count = min(len(extracted.features), len(reference.features), BALL_IMAGES)
    if count < FEWEST_BALLS:
        return {}
    chosen = np.sort(keyed_permutation(seed, epoch=0, size=len(reference.features))[:count])
    shares = precision_recall(extracted.features[:count], reference.features[chosen])
    return {name: Metric(value, count) for name, value in vars(shares).items()}


@dataclass(frozen=True)
class _Work:
    """One set to measure. Picklable."""

    number: int
    pieces: list[FeaturePiece]
    fingerprint: str  # of the reference
    extractor: Identity


def measure_sets(
    config: Config,
    dataset: str,
    evaluator: Evaluator,
    sets: Sequence[ImageSet],
    *,
    near: str,
    runner: Runner,
    on_images: Callable[[int], None],
    on_score: Callable[[RunningScore], None] | None = None,
) -> list[Measured]:
    """All metrics of each set.

    The features stay below the folder `near` until all sets are measured, so that a second call continues an
    interrupted one. `on_images(n)` follows n more images; `on_score` gets the running scores of the first set, at once
    where this process computes, else at the end.
    """
    fingerprint = evaluator.extractor.fingerprint
    works = [
        _Work(
            number,
            feature_pieces(config, dataset, images, near=near, fingerprint=fingerprint),
            evaluator.reference.fingerprint,
            evaluator.extractor,
        )
        for number, images in enumerate(sets)
    ]
    if runner.apart:
        store_pieces([piece for work in works for piece in work.pieces], runner=runner, on_images=on_images)
        found = {work.number: measured for work, measured in runner.each(_measure_set, works, gpu=False)}
        if on_score is not None:
            for score in found[0].running:
                on_score(score)
    else:
        found = {
            work.number: _measure_set(work, on_images=on_images, on_score=None if work.number else on_score)
            for work in works
        }
    for work in works:
        storage.delete_folder(work.pieces[0].folder)
    return [found[work.number] for work in works]


def _compared_in_pixels(images: ImageSet) -> ImageSet:
    """The images whose nearest training images say how near unseen ones are: not training images themselves."""
    if isinstance(images, SplitSet) and images.split == "train":
        return SplitSet(images.dataset, "test", images.count, drawn=images.drawn)
    return images


def _measure_set(
    work: _Work,
    *,
    on_images: Callable[[int], None] | None = None,
    on_score: Callable[[RunningScore], None] | None = None,
) -> Measured:
    first = work.pieces[0]
    config, dataset, images = first.config, first.dataset, first.images
    reference = load_reference(dataset, work.fingerprint)
    assert reference is not None, "the evaluator has it"
    return measure_extracted(
        (extract_piece(piece, partial(extractor_of, config, dataset), on_images=on_images) for piece in work.pieces),
        count=images.count,
        first_images=_compared_in_pixels(images).head(NEIGHBOR_IMAGES),
        reference=reference,
        training_images=open_cache(dataset, "train").images,
        num_splits=config.evaluation.num_splits,
        seed=SEED,
        classes=work.extractor.knows_classes,
        asked=asked_classes(config, dataset, images, extractor=work.extractor.name),
        in_turn=1 if isinstance(images, SplitSet) else classes_in_turn(config),
        extrapolate=config.evaluation.extrapolate,
        by_features=config.evaluation.reference_split == "train",
        on_score=on_score,
    )
