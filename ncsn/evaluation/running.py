"""Features of a stream of images with flat memory, and the Frechet distance so far with its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ncsn.evaluation.extractors import Extracted
from ncsn.evaluation.frechet_distance import (
    JACKKNIFE_GROUPS,
    FrechetStatistics,
    frechet_distance,
    frechet_jackknife,
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
