"""What decides about promotion: a figure with what it takes to compare it, and how many samples are copies."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ncsn.errors import UserError

COPY_ERRORS = 3
"""Standard errors by which the share of copies may lie above that of real images."""


class FingerprintMismatchError(UserError):
    """Two figures that were measured in different ways."""


@dataclass(frozen=True)
class Measurement:
    """One figure of merit.

    Attributes:
        name: `area/what_n<count>`, for example eval/classifier_fid_n512.
        value: the figure.
        uncertainty: its standard deviation over other samples of as many images.
        num_images: generated images behind it.
        fingerprint: hash of extractor, weights, resize, and reference split and data set.
        lower_is_better: the direction of improvement.
    """

    name: str
    value: float
    uncertainty: float
    num_images: int
    fingerprint: str
    lower_is_better: bool

    def __str__(self) -> str:
        """The figure and its uncertainty."""
        return f"{self.value:.4g} \u00b1 {self.uncertainty:.2g}"

    @property
    def is_finite(self) -> bool:
        """Whether both numbers are."""
        return math.isfinite(self.value) and math.isfinite(self.uncertainty)

    def combined_uncertainty(self, other: Measurement) -> float:
        """Standard deviation of the difference of the two: they come from samples that know nothing of each other."""
        return math.hypot(self.uncertainty, other.uncertainty)

    def better_than(self, other: Measurement) -> bool:
        """Whether this figure is better by more than the combined uncertainty; NaN is never better.

        Raises:
            FingerprintMismatchError: if the two were not measured in the same way.
        """
        if (self.name, self.num_images) != (other.name, other.num_images):
            raise FingerprintMismatchError(
                self.name,
                f"over {self.num_images} images cannot be compared with {other.name} over {other.num_images}",
                hint="evaluate both with one extractor and as many images",
            )
        if self.fingerprint != other.fingerprint:
            raise FingerprintMismatchError(
                self.name,
                f"fingerprints {self.fingerprint[:12]} and {other.fingerprint[:12]} differ (extractor, weights or "
                "reference images)",
                hint="evaluate both again with one extractor and data set",
            )
        gain = other.value - self.value if self.lower_is_better else self.value - other.value
        return gain > self.combined_uncertainty(other)


@dataclass(frozen=True)
class Memorisation:
    """How many of the samples copy a training image, beside how many of real test images look like copies.

    Attributes:
        copies: samples among `num_images` that do.
        num_images: samples that were looked at.
        real_copies: real test images among `num_real_images` that do; those stand in the data more than once.
        num_real_images: real test images that were looked at.
    """

    copies: int
    num_images: int
    real_copies: int
    num_real_images: int

    @property
    def limit(self) -> float:
        """Largest share of copies that chance explains: that of real images and three standard errors.

        The standard error of the difference is that of two equal shares, estimated from both sets together.
        """
        pooled = (self.copies + self.real_copies) / (self.num_images + self.num_real_images)
        error = math.sqrt(pooled * (1 - pooled) * (1 / self.num_images + 1 / self.num_real_images))
        return self.real_copies / self.num_real_images + COPY_ERRORS * error

    @property
    def passed(self) -> bool:
        """Whether the samples copy no more than chance explains."""
        return self.copies / self.num_images <= self.limit

    def __str__(self) -> str:
        """The two counts."""
        return (
            f"{self.copies} of {self.num_images} samples copy a training image, "
            f"{self.real_copies} of {self.num_real_images} real ones do"
        )
