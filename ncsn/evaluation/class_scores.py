"""How well images show the classes that were asked for.

Each image is given to the class that a classifier finds most probable: the extractor's own, if it was trained on the
labels of the data, else a linear probe of its features, fitted to the training images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ncsn.evaluation.extractors import Extracted
from ncsn.evaluation.scores import Features, kernel_distance

Labels = npt.NDArray[np.int64]

RIDGE = 1e-3  # of the probe, relative to the variance of the features
BLOCK = 4096  # feature vectors in memory at a time
# Fewer subsets than for all images: there are many classes, and a small class has few different subsets.
NUM_SUBSETS = 10
FEWEST_IMAGES = 2  # of a class, for a kernel distance


@dataclass(frozen=True)
class ClassScores:
    """Agreement with the K classes that were asked for, over the images that have one."""

    confusion: npt.NDArray[np.int64]  # [K, K] images by the class asked for and the class seen
    kids: npt.NDArray[np.float64]  # [K] kernel distance to training images of the class, NaN for too few images

    @property
    def count(self) -> int:
        return int(self.confusion.sum())

    @property
    def agreement(self) -> float:
        """Share of the images that are classified as the requested class."""
        return float(np.trace(self.confusion) / self.count)

    @property
    def metrics(self) -> dict[str, float]:
        """`class_agreement`, and the mean `class_kid` over the classes that have one."""
        kid = {"class_kid": float(np.nanmean(self.kids))} if np.isfinite(self.kids).any() else {}
        return {"class_agreement": self.agreement, **kid}

    def table(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """A line of plain values for each class: `name`, `num_images`, `agreement` and `kid`, None where unknown."""
        counts = self.confusion.sum(axis=1)
        shares = np.diagonal(self.confusion) / np.maximum(counts, 1)
        return [
            {
                "name": name,
                "num_images": int(count),
                "agreement": float(share) if count else None,
                "kid": None if math.isnan(kid) else float(kid),
            }
            for name, count, share, kid in zip(names, counts, shares, self.kids, strict=True)
        ]


@dataclass(frozen=True)
class RequestedClasses:
    """The classes of images to measure, and of the reference images."""

    labels: Labels  # [N] that were asked for, -1 for none
    reference: Labels  # [M] of the reference images, -1 for none
    num_classes: int
    own: bool  # whether the extractor's probabilities are those of these classes

    def scores(self, extracted: Extracted, *, reference: Features, seed: int) -> ClassScores | None:
        """The scores of images [N] beside the features of the reference images [M, D]; None if none has a class."""
        known, size = np.flatnonzero(self.labels >= 0), self.num_classes
        if not len(known):
            return None
        if self.own:
            seen = extracted.log_probabilities.argmax(axis=1)
        else:
            seen = classes_by_probe(fit_probe(reference, self.reference, num_classes=size), extracted.features)
        confusion = np.zeros((size, size), np.int64)
        np.add.at(confusion, (self.labels[known], seen[known]), 1)
        kids = np.full(size, np.nan)
        for label in range(size):
            own, others = np.flatnonzero(self.labels == label), np.flatnonzero(self.reference == label)
            if min(len(own), len(others)) >= FEWEST_IMAGES:
                features = extracted.features[own]
                kids[label], _ = kernel_distance(features, reference[others], num_subsets=NUM_SUBSETS, seed=seed)
        return ClassScores(confusion, kids)


def fit_probe(features: Features, labels: Labels, *, num_classes: int) -> npt.NDArray[np.float64]:
    """Ridge regression of features [M, D] on one-hot labels [M] without those of -1: [D + 1, K], the shift last."""
    size = features.shape[1] + 1
    squares, targets = np.zeros((size, size)), np.zeros((size, num_classes))
    for first in range(0, len(features), BLOCK):
        own = labels[first : first + BLOCK]
        x = _with_one(features[first : first + BLOCK][own >= 0])
        squares += x.T @ x
        np.add.at(targets.T, own[own >= 0], x)
    count = squares[-1, -1]
    variances = np.diagonal(squares)[:-1] / count - (squares[-1, :-1] / count) ** 2
    # So that the penalty does not depend on the scale of a feature, and the shift has none.
    penalty = np.append(RIDGE * count * np.maximum(variances, 1e-12 * (1 + variances.max())), 0.0)
    return np.linalg.solve(squares + np.diag(penalty), targets)


def classes_by_probe(probe: npt.NDArray[np.float64], features: Features) -> Labels:
    """The class of each of [N, D], int64 [N]."""
    parts = range(0, len(features), BLOCK)
    return np.concatenate([(_with_one(features[at : at + BLOCK]) @ probe).argmax(axis=1) for at in parts])


def _with_one(features: Features) -> npt.NDArray[np.float64]:
    x = np.asarray(features, np.float64)
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)
