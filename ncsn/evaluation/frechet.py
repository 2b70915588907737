"""Frechet distance between Gaussians fitted to features (Heusel et al. 2017), in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.linalg.lapack import dpstrf

from ncsn.errors import UserError
from ncsn.evaluation.extractors import Extracted

Array = npt.NDArray[np.float64]

JACKKNIFE_GROUPS = 20
"""The jackknife's own relative error is about 1 / sqrt(2 K): 16%."""


@dataclass(frozen=True)
class FrechetStatistics:
    """First and second moments of a set of D-dimensional features; those of disjoint sets merge exactly.

    Attributes:
        count: number of feature vectors N.
        mean: [D].
        scatter: [D, D], the sum of (f - mean)(f - mean)^T over the set.
    """

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features: npt.ArrayLike) -> FrechetStatistics:
        """Statistics of `features`, [N, D] with N >= 1.

        Raises:
            ValueError: for another shape, or for NaN or infinite values, with how many.
        """
        values = np.asarray(features, dtype=np.float64)
        if values.ndim != 2 or len(values) == 0:
            raise ValueError(f"features must be [images, dimensions] with at least one image, got {list(values.shape)}")
        bad = int((~np.isfinite(values)).any(axis=1).sum())
        if bad:
            raise ValueError(f"{bad} of {len(values)} feature vectors hold NaN or infinity; check the samples for them")
        mean = values.mean(axis=0)
        centred = values - mean
        return cls(count=len(values), mean=mean, scatter=centred.T @ centred)

    @classmethod
    def of_batches(cls, batches: Iterable[npt.ArrayLike]) -> FrechetStatistics:
        """Statistics of a stream of [n, D] batches, in one pass with constant memory."""
        total: FrechetStatistics | None = None
        for batch in batches:
            part = cls.of(batch)
            total = part if total is None else total.merge(part)
        if total is None:
            raise ValueError("no features: the stream of batches is empty")
        return total

    def merge(self, other: FrechetStatistics) -> FrechetStatistics:
        """Statistics of the union of two disjoint sets (the pairwise update of Chan et al. 1979)."""
        _same_dimension(self, other)
        count = self.count + other.count
        shift = other.mean - self.mean
        return FrechetStatistics(
            count=count,
            mean=self.mean + shift * (other.count / count),
            scatter=self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / count),
        )

    def without(self, part: FrechetStatistics) -> FrechetStatistics:
        """Statistics of the set less a subset of it: the inverse of `merge`."""
        _same_dimension(self, part)
        count = self.count - part.count
        mean = (self.count * self.mean - part.count * part.mean) / count
        shift = part.mean - mean
        between = np.outer(shift, shift) * (count * part.count / self.count)
        return FrechetStatistics(count=count, mean=mean, scatter=self.scatter - part.scatter - between)

    @property
    def covariance(self) -> Array:
        """[D, D], with divisor N - 1.

        Raises:
            ValueError: for fewer than two feature vectors.
        """
        if self.count < 2:
            raise UserError("images", "a covariance needs at least 2 images", value=self.count)
        return self.scatter / (self.count - 1)


def frechet_distance(a: FrechetStatistics, b: FrechetStatistics) -> float:
    """||m_a - m_b||^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), at least 0.

    Biased upwards by about 1/N for N images, so compare only figures of equal counts.

    Raises:
        ValueError: for different dimensions or fewer than two images.
    """
    _same_dimension(a, b)
    return frechet_distance_of_gaussians(a.mean, a.covariance, b.mean, b.covariance)


def frechet_uncertainty(
    features: npt.NDArray[np.floating], reference: FrechetStatistics, *, num_groups: int = JACKKNIFE_GROUPS
) -> float:
    """Standard deviation of the Frechet distance of `features` to `reference` over other samples of as many images.

    Delete-a-group jackknife (Kott 2001; Shao and Wu 1989): each of K groups is left out once, and the variance is
    (K - 1) / K times the sum of squares of the K distances about their mean. The reference counts as known, because
    figures that are compared share it.

    Args:
        features: [N, D], N >= 3, in an order that does not matter; every K-th is one group.
        reference: What the distance is measured to.
        num_groups: K; at most N.

    Raises:
        ValueError: for fewer than three images.
    """
    groups = min(num_groups, len(features))
    return frechet_jackknife([FrechetStatistics.of(features[first::groups]) for first in range(groups)], reference)


def frechet_jackknife(groups: Sequence[FrechetStatistics], reference: FrechetStatistics) -> float:
    """`frechet_uncertainty` from the moments of K groups of one set of images.

    Raises:
        ValueError: for fewer than three images.
    """
    whole = reduce(FrechetStatistics.merge, groups)
    if whole.count < 3:
        raise UserError(
            "sampling.num_images", "the uncertainty of a Frechet distance needs at least 3 images", value=whole.count
        )
    reference_factor = factor(reference.covariance)
    distances = np.empty(len(groups))
    for number, group in enumerate(groups):
        rest = whole.without(group)
        shift, covariance = rest.mean - reference.mean, rest.covariance
        # The reference's factor is there, so no second one is taken.
        root_trace = _trace_of_root(reference_factor.T @ covariance @ reference_factor)
        distances[number] = shift @ shift + np.trace(covariance) - 2 * root_trace
    return float(np.sqrt((len(groups) - 1) * distances.var()))


def frechet_distance_of_gaussians(mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array) -> float:
    """Frechet distance of N(mean_a, covariance_a) and N(mean_b, covariance_b)."""
    # With S = F F^T, Tr (S_a S_b)^(1/2) = Tr (G G^T)^(1/2) for G = F_a^T F_b: nothing complex appears, and directions
    # in which a set of few images has no variance drop out instead of adding their rounding error.
    g = factor(covariance_a).T @ factor(covariance_b)
    root_trace = _trace_of_root(g @ g.T if g.shape[0] <= g.shape[1] else g.T @ g)
    shift = mean_a - mean_b
    distance = shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * root_trace
    return max(float(distance), 0.0)


def factor(matrix: Array) -> Array:
    """F [D, rank] with F F^T = a symmetric positive semi-definite [D, D] matrix, by Cholesky with pivots."""
    lower, pivots, rank, _ = dpstrf(matrix, lower=1)
    factored = np.empty((len(matrix), rank))
    factored[pivots - 1] = np.tril(lower)[:, :rank]
    return factored


def _trace_of_root(matrix: Array) -> float:
    """Tr M^(1/2) of a symmetric positive semi-definite matrix."""
    return float(np.sqrt(np.clip(np.linalg.eigvalsh(matrix), 0.0, None)).sum())


def _same_dimension(a: FrechetStatistics, b: FrechetStatistics) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {a.mean.shape[0]} and {b.mean.shape[0]} dimensions cannot be compared; "
            "use one extractor for both"
        )


NORMAL_95 = 1.96
"""Standard deviations on either side that hold 95 % of a normal distribution."""


@dataclass(frozen=True)
class RunningScore:
    """The Frechet distance of the first images, which falls with their number (its bias is about 1/N).

    Attributes:
        num_images: How many.
        fid: Their distance.
        low: Lower end of its 95 % interval over other samples of as many images, at least 0.
        high: Upper end.
    """

    num_images: int
    fid: float
    low: float
    high: float

    def __str__(self) -> str:
        """The distance and half of its interval."""
        return f"FID {self.fid:.4g} \u00b1 {self.high - self.fid:.2g} (95 %) of {self.num_images:,}"

    def named(self, area: str, *, extractor: str) -> dict[str, float]:
        """Metric name -> value at `num_images`, a point of three curves."""
        return {f"{area}/running_{extractor}_{name}": getattr(self, name) for name in ("fid", "low", "high")}


class RunningDistance:
    """Moments of images in K groups, image i in group i mod K; those of disjoint stretches of images merge exactly.

    Args:
        reference: What the distance is measured to.
        first: Index of the first image.
    """

    def __init__(self, reference: FrechetStatistics, *, first: int = 0) -> None:
        self.reference = reference
        self.first = first
        self.count = 0
        self._groups: list[FrechetStatistics | None] = [None] * JACKKNIFE_GROUPS

    @property
    def groups(self) -> list[FrechetStatistics]:
        """The groups that have an image."""
        return [group for group in self._groups if group is not None]

    def add(self, features: npt.NDArray[np.floating]) -> None:
        """Append the features [n, D] of the images that follow; quicker in few large blocks.

        Raises:
            ValueError: for NaN or infinite values.
        """
        for offset in range(min(JACKKNIFE_GROUPS, len(features))):
            group = (self.first + self.count + offset) % JACKKNIFE_GROUPS
            self._take(group, FrechetStatistics.of(features[offset::JACKKNIFE_GROUPS]))
        self.count += len(features)

    def merge(self, other: RunningDistance) -> None:
        """Take in the moments of other images, for example of another shard, in any order."""
        for group, part in enumerate(other._groups):
            if part is not None:
                self._take(group, part)
        self.count += other.count

    def score(self) -> RunningScore:
        """The distance of the images so far.

        Raises:
            ValueError: for fewer than three images.
        """
        groups = self.groups
        distance = frechet_distance(merged(groups), self.reference)
        margin = NORMAL_95 * frechet_jackknife(groups, self.reference)
        return RunningScore(self.count, distance, max(distance - margin, 0.0), distance + margin)

    def _take(self, group: int, part: FrechetStatistics) -> None:
        there = self._groups[group]
        self._groups[group] = part if there is None else there.merge(part)


def merged(groups: Sequence[FrechetStatistics]) -> FrechetStatistics:
    """The moments of all groups together."""
    return reduce(FrechetStatistics.merge, groups)


def score_marks(count: int, *, num_features: int) -> list[int]:
    """Numbers of images after which a running score is due: twice the features, doubled on and on, and `count`.

    With fewer images than features the covariance has no full rank, and the distance says little.
    """
    marks = []
    mark = 2 * num_features
    while mark < count:
        marks.append(mark)
        mark *= 2
    return [*marks, count]


class RunningScores:
    """Scores of the first images whose features are there, though these come in any order of stretches.

    Those of the same images, at the same numbers of them, as of an evaluation of all.

    Args:
        reference: What the distance is measured to.
        count: Images to come.
    """

    def __init__(self, reference: FrechetStatistics, *, count: int) -> None:
        self._running = RunningDistance(reference)
        self._marks = score_marks(count, num_features=len(reference.mean))
        self._waiting: dict[int, npt.NDArray[np.floating]] = {}

    def add(self, first: int, features: npt.NDArray[np.floating]) -> list[RunningScore]:
        """Take the features [n, D] of images `first .. first + n`, each image once; the scores that are due now.

        Raises:
            ValueError: for NaN or infinite values.
        """
        self._waiting[first] = features
        due = []
        while (block := self._waiting.pop(self._running.count, None)) is not None:
            last = self._marks[0] - self._running.count
            if len(block) > last:
                self._waiting[self._marks[0]] = block[last:]
            self._running.add(block[:last])
            if self._running.count == self._marks[0]:
                due.append(self._running.score())
                self._marks = self._marks[1:]
        return due


class Spool:
    """What an extractor sees, in memory-mapped files, whose pages leave memory under pressure.

    Args:
        folder: Local folder for the files.
        count: Images to come, at most.
    """

    def __init__(self, folder: Path, *, count: int) -> None:
        self.done = 0
        self._folder, self._count = folder, count
        self._files: dict[str, np.memmap] = {}

    def add(self, extracted: Extracted) -> None:
        """Append what was seen in some images."""
        last = self.done + len(extracted.features)
        for name in ("features", "log_probabilities"):
            values = getattr(extracted, name)
            if name not in self._files:
                self._files[name] = np.lib.format.open_memmap(
                    self._folder / f"{name}.npy", mode="w+", dtype=values.dtype, shape=(self._count, values.shape[1])
                )
            self._files[name][self.done : last] = values
        self.done = last

    @property
    def extracted(self) -> Extracted:
        """All that was appended.

        Raises:
            ValueError: if that is nothing.
        """
        if not self.done:
            raise ValueError("there are no images to evaluate")
        return Extracted(
            features=self._files["features"][: self.done],
            log_probabilities=self._files["log_probabilities"][: self.done],
        )
