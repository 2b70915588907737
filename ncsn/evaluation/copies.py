"""How many of a set of images are copies, and what that says. Imports no torch, since the gate reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

CHANCE = 1 / 1000  # the share of unseen images that is as near to training as the threshold for copies
ALARM = 0.01  # how often as many of a set of unseen images are below the threshold as are told to be copies
SURE = 0.025, 0.975  # ends of a 95 % interval


@dataclass(frozen=True)
class Copies:
    """How many images are nearer to training images than those of the test split are.

    The threshold is the statistic of the test image of rank `rank`, from the nearest one. Unseen images and test images
    come in any order with the same probability, so chance alone decides how many unseen images are below it.
    """

    copies: int
    num_images: int
    num_test: int  # test images that nearly equal no training image
    num_near_test: int  # and those that do

    @property
    def rank(self) -> int:
        """Which of the test images is the threshold, from 1; each that nearly equals a training image is below it."""
        return self.num_near_test + max(1, round(CHANCE * self.num_test))

    @property
    def expected(self) -> float:
        """The share expected by chance."""
        return self.rank / (self.num_near_test + self.num_test + 1)

    @property
    def more_than_chance(self) -> bool:
        """Whether as many of these images would rarely be below the threshold if they were unseen: Fisher's exact test.

        They are if, of the nearest `copies + rank - 1` of these and the test images together, few are test images.
        """
        tests, nearest = self.num_near_test + self.num_test, self.copies + self.rank - 1
        among = np.arange(max(0, nearest - self.num_images), self.rank)  # test images among the nearest
        logs = _log_binomial(tests, among) + _log_binomial(self.num_images, nearest - among)
        return float(np.exp(logs - _log_binomial(self.num_images + tests, nearest)).sum()) < ALARM

    @property
    def unclear(self) -> bool:
        """Whether copies cannot be told: neither these nor half of the images would be more than chance."""
        return not replace(self, copies=max(self.copies, math.ceil(self.num_images / 2))).more_than_chance

    def __str__(self) -> str:
        """`Of 2,560 images 3 are copies, 2.6 expected by chance`."""
        if self.unclear:
            tests = self.num_near_test + self.num_test
            return (
                f"Copies cannot be told from {self.num_images:,} images and {tests:,} test images, of which "
                f"{self.num_near_test:,} nearly equal a training image: test images must be more, or of other places, "
                "people or series"
            )
        counted = {0: "none is a copy", 1: "1 is a copy"}.get(self.copies, f"{self.copies:,} are copies")
        chance = f"{self.expected * self.num_images:,.1f} expected by chance"
        advice = ": train shorter, or leave them out" if self.more_than_chance else ""
        return f"Of {self.num_images:,} images {counted}, {chance}{advice}"


def _log_binomial(count: int, chosen: int | NDArray[np.int64]) -> NDArray[np.float64]:
    from scipy.special import betaln  # here, so that commands that judge nothing do not load it

    return np.asarray(-np.log1p(count) - betaln(count - np.asarray(chosen) + 1, np.asarray(chosen) + 1))


def interval(count: int, num_images: int) -> tuple[float, float]:
    """The 95 % interval of a share of images, by Clopper and Pearson."""
    from scipy.special import betaincinv

    low = betaincinv(count, num_images - count + 1, SURE[0]) if count else 0.0
    return float(low), float(betaincinv(count + 1, num_images - count, SURE[1]) if count < num_images else 1.0)
