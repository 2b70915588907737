"""Small datasets that are read whole: scikit-learn's digits and photographs, MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from ncsn.config.schema import DataConfig
from ncsn.data.pixels import Fit
from ncsn.data.sources.base import Example, Source, hold_out, name_hash
from ncsn.data.sources.in_memory import Arrays, downloading, require_labels
from ncsn.data.sources.listing import root_of
from ncsn.errors import NotFound, UserError

_GZIP_MAGIC = b"\x1f\x8b"
_UINT8 = 0x08
_IDX_PREFIXES = {"train": "train", "test": "t10k"}
_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# Datasets in IDX files: description, license, class names, and their class in torchvision.
_IDX = {
    "mnist": (
        "MNIST handwritten digits, Y. LeCun, C. Cortes and C. Burges, 28x28 gray",
        "CC BY-SA 3.0",
        tuple("0123456789"),
        "MNIST",
    ),
    "fashion_mnist": (
        "Fashion-MNIST articles of clothing, H. Xiao, K. Rasul and R. Vollgraf 2017, 28x28 gray",
        "MIT",
        _FASHION,
        "FashionMNIST",
    ),
}
# What share of a photograph's training columns is left of its test strip, so that the strip has its share of sky, roof,
# petals and leaves.
_PHOTOGRAPHS = {"china": 0.5, "flower": 0.2}
_SCALES = (1, 2, 4)  # sides of the patches over data.image_size


class Patch(NamedTuple):
    """A square of a photograph, in pixels."""

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
        """Patches `first .. last`."""
        return replace(self, patches=self.patches[first:last])

    def stream(self, *, cores: int | None = None) -> Iterator[Example]:  # noqa: ARG002
        """Each patch; see `Split`."""
        for photograph, side, top, left in self.patches:
            pixels = self.photographs[photograph][top : top + side, left : left + side]
            fitted = self.fit.array(pixels)
            yield Example(fitted.image, photograph, fitted.conversions)


def locate_package(_data: DataConfig) -> str:
    """The package that the images come with."""
    return f"comes with scikit-learn {metadata.version('scikit-learn')}"


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


def open_idx(data: DataConfig) -> Source:
    """MNIST or Fashion-MNIST from the folder data.root."""
    description, terms, class_names, torchvision_class = _IDX[data.source]
    return Source(description, terms, class_names, _idx_splits(data, torchvision_class=torchvision_class))


def locate_idx(data: DataConfig) -> str:
    """The folder of the files."""
    _, _, _, torchvision_class = _IDX[data.source]
    return str(_idx_files(data, torchvision_class)["train", "images"].parent)


def _idx_splits(data: DataConfig, *, torchvision_class: str) -> dict[str, Arrays]:
    paths = _idx_files(data, torchvision_class)
    splits = {}
    for split in _IDX_PREFIXES:
        image_file, label_file = paths[split, "images"], paths[split, "labels"]
        images, labels = _read_idx(image_file, dimensions=3), _read_idx(label_file, dimensions=1)
        if len(labels) != len(images):
            raise UserError(
                str(label_file),
                f"holds {len(labels)} labels, but {image_file} holds {len(images)} images",
                hint="fetch both again, they do not belong together",
            )
        require_labels(labels, num_classes=10, name=str(label_file))
        splits[split] = Arrays(images[..., None], labels, Fit.of(data))
    return splits


def _idx_files(data: DataConfig, torchvision_class: str) -> dict[tuple[str, str], Path]:
    """(split, kind) -> file below data.root: in it, in its `raw`, or where torchvision puts them."""
    if data.download and data.root is not None:
        root = Path(data.root).expanduser()
        if None in _find_idx(root, torchvision_class).values():
            from torchvision import datasets

            with downloading(torchvision_class, "its four IDX files", root):
                getattr(datasets, torchvision_class)(root=str(root), train=True, download=True)
    found = {}
    for (split, kind), path in _find_idx(root_of(data), torchvision_class).items():
        if path is None:
            raise NotFound(
                "data.root",
                f"has no {_idx_names(split, kind)[0]} (or .gz), nor has its folder raw or {torchvision_class}/raw",
                hint=f"put the four IDX files of {data.source} there, or set data.download to true",
                value=data.root,
            )
        found[split, kind] = path
    return found


def _find_idx(root: Path, torchvision_class: str) -> dict[tuple[str, str], Path | None]:
    folders = (root, root / "raw", root / torchvision_class / "raw")
    found = {}
    for split in _IDX_PREFIXES:
        for kind in ("images", "labels"):
            candidates = (folder / name for folder in folders for name in _idx_names(split, kind))
            found[split, kind] = next((path for path in candidates if path.is_file()), None)
    return found


def _idx_names(split: str, kind: str) -> list[str]:
    suffix = "idx3-ubyte" if kind == "images" else "idx1-ubyte"
    return [f"{_IDX_PREFIXES[split]}-{kind}{dot}{suffix}{gz}" for dot in ("-", ".") for gz in ("", ".gz")]


def _read_idx(path: Path, *, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file, plain or gzipped: 3 dimensions for images, 1 for labels."""
    content, start = _unzipped(path), 4 + 4 * dimensions
    if len(content) < start:
        raise UserError(
            str(path), f"is truncated: expected a header of {start} bytes, found {len(content)}", hint="fetch it again"
        )
    magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
    expected_magic = (_UINT8 << 8) + dimensions
    if magic != expected_magic:
        raise UserError(
            str(path),
            f"another kind of file: starts with magic number 0x{magic:08x}, but IDX "
            f"{'images' if dimensions == 3 else 'labels'} start with 0x{expected_magic:08x}",
        )
    expected, found = math.prod(shape), len(content) - start
    if expected != found or 0 in shape[1:]:
        raise UserError(
            str(path),
            f"{'is truncated' if found < expected else 'is too long'}: expected {' x '.join(map(str, shape))} = "
            f"{expected} bytes after the header, found {found}",
            hint="fetch it again",
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _unzipped(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except EOFError:
        return zlib.decompressobj(wbits=31).decompress(content)  # as far as it goes; the caller misses the rest
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(str(path), f"is a damaged gzip file ({error})", hint="fetch it again") from error
