"""How many of a set of images are copies, and what that says. Imports no torch, since the gate reads it."""

from __future__ import annotations

from dataclasses import dataclass

CHANCE = 1 / 1000  # the share of unseen images that is as near to training as the threshold for copies
SURE = 0.025, 0.975  # ends of a 95 % interval


@dataclass(frozen=True)
class Copies:
    """How many images are nearer to training images than those of the test split are.

    The threshold is the statistic of the test image of rank `rank`, so the share of unseen images below it has the
    distribution Beta(rank, num_test - rank + 1).
    """

    copies: int
    num_images: int
    num_test: int  # test images without a near duplicate among the training images

    @property
    def rank(self) -> int:
        """Which of the test images is the threshold, from 1."""
        return max(1, round(CHANCE * self.num_test))

    @property
    def expected(self) -> float:
        """The share expected by chance."""
        return self.rank / (self.num_test + 1)

    @property
    def excess_low(self) -> float:
        """The lower end of the share of copies less the upper end of what chance explains."""
        from scipy.special import betaincinv  # here, so that commands that judge nothing do not load it

        low = betaincinv(self.copies, self.num_images - self.copies + 1, SURE[0]) if self.copies else 0.0
        return float(low - betaincinv(self.rank, self.num_test - self.rank + 1, SURE[1]))

    @property
    def more_than_chance(self) -> bool:
        return self.excess_low > 0

    def __str__(self) -> str:
        """`Of 2,560 images 3 are copies, 2.6 are expected by chance`."""
        counted = {0: "none is a copy", 1: "1 is a copy"}.get(self.copies, f"{self.copies:,} are copies")
        chance = f"{self.expected * self.num_images:,.1f} expected by chance"
        advice = ": train shorter, or leave them out" if self.more_than_chance else ""
        return f"Of {self.num_images:,} images {counted}, {chance}{advice}"
