"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017), in float64."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg.lapack import dpstrf
from threadpoolctl import threadpool_limits

from ncsn.errors import InvalidValue, UserError
from ncsn.evaluation import DEVIATIONS
from ncsn.runs.metrics import with_interval

Array = npt.NDArray[np.float64]

JACKKNIFE_GROUPS = 20  # the jackknife's own relative error is about 1 / sqrt(2 K): 16 %
MANY_FEATURES = 512  # from which the eigenvalues of a group take longer than to start threads


def jackknife_groups(first: int, last: int, *, classes_in_turn: int = 1) -> npt.NDArray[np.int64]:
    """The group of each of the images `first .. last`, int64 [last - first].

    Image i has class i mod `classes_in_turn`. Each group has all classes alike, because the jackknife would see the
    distance between them else.
    """
    turns, classes = np.divmod(np.arange(first, last), classes_in_turn)
    return (turns + classes) % JACKKNIFE_GROUPS


@dataclass(frozen=True)
class FrechetStatistics:
    """First and second moments of a set of D-dimensional features; those of disjoint sets merge exactly."""

    count: int
    mean: Array  # [D]
    scatter: Array  # [D, D], the sum of (f - mean)(f - mean)^T

    @classmethod
    def of(cls, features: npt.ArrayLike) -> FrechetStatistics:
        """Statistics of finite features [N, D] with N >= 1."""
        values = np.asarray(features, dtype=np.float64)
        bad = int((~np.isfinite(values)).any(axis=1).sum())
        if bad:
            raise InvalidValue(
                f"{bad:,} of {len(values):,} feature vectors hold NaN or infinity; check the samples for them"
            )
        mean = values.mean(axis=0)
        centered = values - mean
        return cls(count=len(values), mean=mean, scatter=centered.T @ centered)

    def without(self, part: FrechetStatistics) -> FrechetStatistics:
        """Statistics of the set less a subset of it: the inverse of `merged`."""
        count = self.count - part.count
        mean = (self.count * self.mean - part.count * part.mean) / count
        shift = part.mean - mean
        between = np.outer(shift, shift) * (count * part.count / self.count)
        return FrechetStatistics(count=count, mean=mean, scatter=self.scatter - part.scatter - between)

    @property
    def covariance(self) -> Array:
        """[D, D], with divisor N - 1; of two feature vectors or more."""
        if self.count < 2:
            raise UserError("images", "a covariance needs at least 2 images", value=self.count)
        return self.scatter / (self.count - 1)


def merged(parts: Iterable[FrechetStatistics]) -> FrechetStatistics:
    """Statistics of the union of disjoint sets, one or more (the pairwise update of Chan et al. 1979)."""
    parts = iter(parts)
    whole = next(parts)
    for part in parts:
        count, shift = whole.count + part.count, part.mean - whole.mean
        whole = FrechetStatistics(
            count=count,
            mean=whole.mean + shift * (part.count / count),
            scatter=whole.scatter + part.scatter + np.outer(shift, shift) * (whole.count * part.count / count),
        )
    return whole


def frechet_distance(a: FrechetStatistics, b: FrechetStatistics) -> float:
    """||m_a - m_b||^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), at least 0.

    Biased upwards by about 1/N for N images, so compare only distances of equal counts.
    """
    # With S = F F^T, Tr (S_a S_b)^(1/2) = Tr (G G^T)^(1/2) for G = F_a^T F_b: nothing complex appears, and directions
    # in which a set of few images has no variance drop out instead of adding their rounding error.
    g = factor(a.covariance).T @ factor(b.covariance)
    root_trace = _trace_of_root(g @ g.T if g.shape[0] <= g.shape[1] else g.T @ g)
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_trace
    return max(float(distance), 0.0)


def frechet_jackknife(groups: Sequence[FrechetStatistics], reference: FrechetStatistics) -> float:
    """Standard deviation of the log of the Fréchet distance of K disjoint groups over other samples of their size.

    That of the distance itself grows with the distance, so the luckiest set would claim the least error. The reference
    counts as known, because metrics that are compared share it.
    """
    return jackknife_deviation(frechet_without(groups, reference))


def jackknife_deviation(without_group: Array) -> float:
    """Standard deviation of an estimate by its values without each of K groups [K].

    Delete-a-group jackknife (Kott 2001; Shao and Wu 1989): the variance is (K - 1) / K times the sum of squares of the
    values about their mean.
    """
    return float(np.sqrt((len(without_group) - 1) * without_group.var()))


def frechet_without(groups: Sequence[FrechetStatistics], reference: FrechetStatistics) -> Array:
    """The log of the Fréchet distance of K disjoint groups without each of them [K]."""
    whole = merged(groups)
    if whole.count < 3:
        reason = "the uncertainty of a Fréchet distance needs at least 3 images"
        raise UserError("sampling.num_images", reason, value=whole.count)
    reference_factor, traces = factor(reference.covariance), np.trace(whole.covariance + reference.covariance)

    def distance(group: FrechetStatistics) -> float:
        rest = whole.without(group)
        shift, covariance = rest.mean - reference.mean, rest.covariance
        # The reference's factor is at hand, so that of the rest is not needed.
        root_trace = _trace_of_root(reference_factor.T @ covariance @ reference_factor)
        return float(shift @ shift + np.trace(covariance + reference.covariance) - 2 * root_trace)

    with ExitStack() as stack:
        each: Iterable[float] = map(distance, groups)
        if len(whole.mean) >= MANY_FEATURES:
            # LAPACK finds eigenvalues on little more than one core, so groups have one each. Of the twenty, ten at once
            # are done as soon as nineteen, and need half the memory.
            cores = min(len(os.sched_getaffinity(0)), JACKKNIFE_GROUPS // 2)
            stack.enter_context(threadpool_limits(1, user_api="blas"))
            each = stack.enter_context(ThreadPoolExecutor(cores)).map(distance, groups)
        distances = np.array(list(each))
    least = np.finfo(float).eps * traces + np.finfo(float).tiny  # below this a distance is rounding error
    logs: Array = np.log(np.maximum(distances, least))
    return logs


def factor(matrix: Array) -> Array:
    """F [D, rank] with F F^T = a symmetric positive semi-definite [D, D] matrix, by Cholesky with pivots."""
    lower, pivots, rank, _ = dpstrf(matrix, lower=1)
    factored = np.empty((len(matrix), rank))
    factored[pivots - 1] = np.tril(lower)[:, :rank]
    return factored


def _trace_of_root(matrix: Array) -> float:
    """Tr M^(1/2) of a symmetric positive semi-definite matrix."""
    return float(np.sqrt(np.clip(np.linalg.eigvalsh(matrix), 0.0, None)).sum())


@dataclass(frozen=True)
class RunningScore:
    """The Fréchet distance of the first images, which falls with their number (its bias is about 1/N)."""

    num_images: int
    fid: float
    log_std: float  # standard deviation of its log over other samples of as many images

    @property
    def values(self) -> dict[str, float]:
        """The distance and its 95 % interval, which is symmetric in its log."""
        factor = float(np.exp(DEVIATIONS * self.log_std))
        return {"fid": self.fid, "fid_low": self.fid / factor, "fid_high": self.fid * factor}

    def __str__(self) -> str:
        return f"FID {with_interval(*self.values.values())} of {self.num_images:,}"

    def named(self, area: str, *, extractor: str) -> dict[str, float]:
        """Metric name -> value at `num_images`, a point of three curves."""
        return {f"{area}/running_{extractor}_{name}": value for name, value in self.values.items()}


def score_of(
    features: npt.NDArray[np.floating], reference: FrechetStatistics, *, classes_in_turn: int = 1
) -> RunningScore:
    """The Fréchet distance of the features [N, D] of the first images."""
    groups = groups_of(features, classes_in_turn=classes_in_turn)
    distance = frechet_distance(merged(groups), reference)
    return RunningScore(len(features), distance, frechet_jackknife(groups, reference))


def groups_of(features: npt.NDArray[np.floating], *, classes_in_turn: int = 1) -> list[FrechetStatistics]:
    """Statistics of the groups of the jackknife among the first images, whose features [N, D] these are."""
    numbers = jackknife_groups(0, len(features), classes_in_turn=classes_in_turn)
    return [FrechetStatistics.of(features[numbers == number]) for number in np.unique(numbers)]


class RunningDistance:
    """Fréchet distance to `reference` of the first images, at more and more of `count` images.

    It keeps the moments of the images in the groups of the jackknife.
    """

    def __init__(self, reference: FrechetStatistics, *, count: int, classes_in_turn: int = 1) -> None:
        self.reference = reference
        self._classes = classes_in_turn  # image i has class i mod this number
        self.count = 0  # images taken so far, without a gap
        # A score is due at twice as many images as features, then at doubled numbers, and at the end: with fewer images
        # the covariance has no full rank, and the distance says little.
        doubled = (len(reference.mean) << power for power in itertools.count(1))
        self._marks = [*itertools.takewhile(lambda mark: mark < count, doubled), count]
        self.groups: list[FrechetStatistics | None] = [None] * JACKKNIFE_GROUPS  # None without an image
        self._waiting: dict[int, npt.NDArray[np.floating]] = {}

    def add(self, first: int, features: npt.NDArray[np.floating]) -> list[RunningScore]:
        """Take the features [n, D] of images `first .. first + n`, in any order; the scores that are due now.

        A score is due as soon as the features of its images are there. Few large blocks are faster.
        """
        self._waiting[first] = features
        due = []
        while self._marks and (block := self._waiting.pop(self.count, None)) is not None:
            room = self._marks[0] - self.count
            if len(block) > room:
                self._waiting[self._marks[0]] = block[room:]
                block = block[:room]
            numbers = jackknife_groups(self.count, self.count + len(block), classes_in_turn=self._classes)
            for number in np.unique(numbers):
                part, group = FrechetStatistics.of(block[numbers == number]), self.groups[number]
                self.groups[number] = part if group is None else merged([group, part])
            self.count += len(block)
            if self.count == self._marks[0]:
                self._marks.pop(0)
                groups = [group for group in self.groups if group is not None]
                distance = frechet_distance(merged(groups), self.reference)
                due.append(RunningScore(self.count, distance, frechet_jackknife(groups, self.reference)))
        return due
