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
    near: int  # of these nearly equal a training image
    num_images: int
    num_test: int  # test images that nearly equal no training image
    num_near_test: int  # and those that do

    @property
    def rank(self) -> int:
        """Which of the test images is the threshold, from 1."""
        return max(1, round(CHANCE * self.num_test))

    @property
    def expected(self) -> float:
        """The share expected by chance."""
        return self.rank / (self.num_test + 1)

    @property
    def more_than_chance(self) -> bool:
        """Whether the lower end of the share of copies is above what chance explains.

        Of few test images, chance explains much. So the lower end of the share that nearly equals a training image is
        compared with the share of test images that does, counting one more.
        """
        (low, _), (near, _) = (interval(count, self.num_images) for count in (self.copies, self.near))
        _, explained = interval(self.rank - 1, self.num_test)
        return low > explained or near > (self.num_near_test + 1) / (self.num_near_test + self.num_test + 1)

    def __str__(self) -> str:
        """`Of 2,560 images 3 are copies, 2.6 expected by chance`."""
        counted = {0: "none is a copy", 1: "1 is a copy"}.get(self.copies, f"{self.copies:,} are copies")
        chance = f"{self.expected * self.num_images:,.1f} expected by chance"
        advice = ": train shorter, or leave them out" if self.more_than_chance else ""
        return f"Of {self.num_images:,} images {counted}, {chance}{advice}"


def interval(count: int, num_images: int) -> tuple[float, float]:
    """The 95 % interval of a share of images, by Clopper and Pearson."""
    from scipy.special import betaincinv  # here, so that commands that judge nothing do not load it

    low = betaincinv(count, num_images - count + 1, SURE[0]) if count else 0.0
    return float(low), float(betaincinv(count + 1, num_images - count, SURE[1]) if count < num_images else 1.0)
