"""What comes with scikit-learn: handwritten digits, and patches of two photographs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np

from ncsn.config.schema import DataConfig
from ncsn.data.pixels import Example, Fit
from ncsn.data.sources.base import Arrays, Source, hold_out, name_hash
from ncsn.errors import UserError

# What share of a photograph's training columns is left of its test strip, so that the strip has its share of sky, roof,
# petals and leaves.
_PHOTOGRAPHS = {"china": 0.5, "flower": 0.2}
_SCALES = (1, 2, 4)  # sides of the patches over data.image_size


class Patch(NamedTuple):
    photograph: int  # which one, which is also the label
    side: int
    top: int
    left: int


@dataclass(frozen=True)
class Patches:
    """A split of patches, which are cut out when they are read."""

    photographs: tuple[np.ndarray, ...]  # uint8 [H, W, 3]
    patches: tuple[Patch, ...]
    fit: Fit
    in_tasks: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.patches)

    def section(self, first: int, last: int) -> Patches:
        return replace(self, patches=self.patches[first:last])

    def stream(self, *, cores: int | None = None) -> Iterator[Example]:  # noqa: ARG002
        for photograph, side, top, left in self.patches:
            pixels = self.photographs[photograph][top : top + side, left : left + side]
            yield self.fit.array(pixels, photograph)


def open_digits(data: DataConfig) -> Source:
    """The digits of scikit-learn, their ink 0..16 spread over 0..255, with a share held out for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.floor(digits.images * (255 / 16) + 0.5).astype(np.uint8)[..., None]
    labels = digits.target.astype(int)
    chosen = hold_out([f"digit {index}" for index in range(len(labels))], labels.tolist(), data.test_fraction)
    return Source(
        description="Optical Recognition of Handwritten Digits (test part), E. Alpaydin and C. Kaynak 1998, 8x8 gray",
        license="CC BY 4.0 (UCI Machine Learning Repository); shipped with scikit-learn",
        class_names=tuple(str(name) for name in digits.target_names),
        splits={split: Arrays(images[rows], labels[rows], Fit.of(data)) for split, rows in chosen.items()},
    )


def open_photos(data: DataConfig) -> Source:
    """Patches of scikit-learn's two photographs, in a fixed shuffled order.

    The test patches come from a strip over the whole height that takes data.test_fraction of the width, and the
    training patches from both sides of it. They have one, two and four times the size data.image_size, as far as both
    splits have room for them, and begin at every quarter of data.image_size.
    """
    from sklearn.datasets import load_sample_image

    photographs = {name: load_sample_image(f"{name}.jpg") for name in _PHOTOGRAPHS}
    columns = {name: _columns(image.shape[1], data.test_fraction, name) for name, image in photographs.items()}
    height = min(len(image) for image in photographs.values())
    widest = [max(last - first for first, last in found) for each in columns.values() for found in each.values()]
    largest = min(height, *widest)
    sides = [scale * data.image_size for scale in _SCALES if scale * data.image_size <= largest]
    if not sides:
        raise UserError(
            "data.image_size",
            f"leaves no patches: the largest that fit into both splits of both photographs have {largest} pixels",
            hint="lower it, or change data.test_fraction",
            value=data.image_size,
        )
    splits = {}
    for split in ("train", "test"):
        patches = [
            Patch(label, side, top, left)
            for label, (name, image) in enumerate(photographs.items())
            for side in sides
            for first, last in columns[name][split]
            for left in range(first, last - side + 1, data.image_size // 4)
            for top in range(0, len(image) - side + 1, data.image_size // 4)
        ]
        patches.sort(key=lambda patch: name_hash(str(tuple(patch))))
        splits[split] = Patches(tuple(photographs.values()), tuple(patches), Fit.of(data))
    return Source(
        description="patches of the photographs china by danielbuechele and flower by vultilion, 640x427 RGB",
        license="CC BY 2.0; shipped with scikit-learn",
        class_names=tuple(photographs),
        splits=splits,
    )


def _columns(width: int, test_fraction: float, name: str) -> dict[str, list[tuple[int, int]]]:
    """Split -> first and last + 1 of the columns of a photograph that are its own."""
    strip = round(width * test_fraction)
    left = round((width - strip) * _PHOTOGRAPHS[name])
    return {"train": [(0, left), (left + strip, width)], "test": [(left, left + strip)]}
