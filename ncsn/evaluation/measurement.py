"""A figure with what it takes to compare it: its sample count and how it was measured."""

from __future__ import annotations

from dataclasses import dataclass


class FingerprintMismatchError(ValueError):
    """Two figures that were measured in different ways."""


@dataclass(frozen=True)
class Measurement:
    """One figure of merit.

    Attributes:
        name: `area/what_n<count>`, for example eval/classifier_fid_n512.
        value: the figure.
        num_images: generated images behind it.
        fingerprint: hash of extractor, weights, resize, and reference split and data set.
        lower_is_better: the direction of improvement.
    """

    name: str
    value: float
    num_images: int
    fingerprint: str
    lower_is_better: bool

    def better_than(self, other: Measurement) -> bool:
        """Whether this figure is strictly better; NaN is never better.

        Raises:
            FingerprintMismatchError: if the two were not measured in the same way.
        """
        if (self.name, self.num_images) != (other.name, other.num_images):
            raise FingerprintMismatchError(
                f"{self.name} over {self.num_images} images cannot be compared with {other.name} over "
                f"{other.num_images}; evaluate both with one extractor and as many images"
            )
        if self.fingerprint != other.fingerprint:
            raise FingerprintMismatchError(
                f"{self.name}: fingerprint {self.fingerprint[:12]} and {other.fingerprint[:12]} differ (extractor, "
                "weights or reference images); evaluate both again with one extractor and data set"
            )
        return self.value < other.value if self.lower_is_better else self.value > other.value
