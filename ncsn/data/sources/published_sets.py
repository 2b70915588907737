"""Published sets that come as arrays: scikit-learn's digits and photographs; MNIST, Fashion-MNIST and CIFAR-10.

torchvision reads the latter, and checks the digest of what it unpickles.
"""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ncsn.config.schema import DataConfig
from ncsn.data.format import SPLITS
from ncsn.data.pixels import Example, Fit
from ncsn.data.sources.base import Source, hold_out, name_ranks, root_of
from ncsn.errors import NotFound, UserError


@dataclass(frozen=True)
class Arrays:
    images: Sequence[np.ndarray] | np.ndarray  # N of uint8 [H, W, C], of any size
    labels: np.ndarray  # [N]
    fit: Fit
    in_tasks: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.labels)

    def section(self, first: int, last: int) -> Arrays:
        return replace(self, images=self.images[first:last], labels=self.labels[first:last])

    def stream(self, *, cores: int | None = None) -> Iterator[Example]:  # noqa: ARG002
        return map(self.fit.array, self.images, self.labels.tolist())


# What share of a photograph's training columns is left of its test strip, so that the strip has its share of sky, roof,
# petals and leaves.
_PHOTOGRAPHS = {"china": 0.5, "flower": 0.2}
_SCALES = (1, 2, 4)  # sides of the patches over the longer one of data.image_size


def open_digits(data: DataConfig) -> Source:
    """The digits of scikit-learn, their ink 0..16 spread over 0..255, with a share held out for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.floor(digits.images * (255 / 16) + 0.5).astype(np.uint8)[..., None]
    labels = digits.target.astype(int)
    chosen = hold_out(name_ranks(f"digit {index}" for index in range(len(labels))), labels, data.test_fraction)
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
    largest = min(len(image) for image in photographs.values())
    columns = {}  # name -> split -> first and last + 1 of the columns that are its own
    for name, image in photographs.items():
        width = image.shape[1]
        strip = round(width * data.test_fraction)
        left = round((width - strip) * _PHOTOGRAPHS[name])
        columns[name] = {"train": [(0, left), (left + strip, width)], "test": [(left, left + strip)]}
        largest = min(largest, strip, max(left, width - left - strip))
    size = max(data.stored_shape[:2])
    sides = [scale * size for scale in _SCALES if scale * size <= largest]
    if not sides:
        reason = f"leaves no patches: the largest that fit into both splits of both photographs have {largest} pixels"
        hint = "lower it, or change data.test_fraction"
        raise UserError("data.image_size", reason, hint=hint, value=data.image_size)
    splits = {}
    for split in ("train", "test"):
        patches = [
            (label, side, top, left)
            for label, (name, image) in enumerate(photographs.items())
            for side in sides
            for first, last in columns[name][split]
            for left in range(first, last - side + 1, size // 4)
            for top in range(0, len(image) - side + 1, size // 4)
        ]
        shuffled = [patches[place] for place in np.argsort(name_ranks(map(str, patches)))]
        images = list(photographs.values())
        cut = [images[label][top : top + side, left : left + side] for label, side, top, left in shuffled]
        splits[split] = Arrays(cut, np.array([label for label, *_ in shuffled]), Fit.of(data))
    return Source(
        description="patches of the photographs china by danielbuechele and flower by vultilion, 640x427 RGB",
        license="CC BY 2.0; shipped with scikit-learn",
        class_names=tuple(photographs),
        splits=splits,
    )


# The name of the class in torchvision, a description, and the license.
_SETS = {
    "mnist": ("MNIST", "MNIST handwritten digits, Y. LeCun, C. Cortes and C. Burges, 28x28 gray", "CC BY-SA 3.0"),
    "fashion_mnist": (
        "FashionMNIST",
        "Fashion-MNIST articles of clothing, H. Xiao, K. Rasul and R. Vollgraf 2017, 28x28 gray",
        "MIT",
    ),
    "cifar10": (
        "CIFAR10",
        "CIFAR-10, A. Krizhevsky 2009, 32x32 RGB",
        "no license stated by its authors; collected from the web",
    ),
}
_IDX_FILES = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
_MOST_IDX_BYTES = 1 << 28  # of a file, five times the largest of MNIST
_CIFAR_ARCHIVE, _CIFAR_FOLDER, _CIFAR_BATCH = "cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1"


def open_torchvision(data: DataConfig) -> Source:
    """One of the sets from data.root, into which it is downloaded first if data.download says so."""
    from torchvision import datasets

    name, description, terms = _SETS[data.source]
    kind = getattr(datasets, name)
    try:
        place = _place(data)
    except NotFound:
        if not data.download or data.root is None:
            raise
        root = Path(data.root).expanduser()
        try:
            kind(str(root), download=True)  # which verifies the digest
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConnectionError(f"torchvision could not download {name} into {root}: {reason}") from error
        place = _place(data)
    splits = {}
    class_names: tuple[str, ...] = tuple("0123456789")
    with _laid_out(place, name, kind) as folder:
        for split in SPLITS:
            try:
                found = kind(str(folder), train=split == "train")
                images, labels = np.asarray(found.data), np.asarray(found.targets, np.int64)
                if len(images) != len(labels) or labels.min() < 0 or labels.max() >= len(class_names):
                    raise ValueError(f"{len(images)} images, {len(labels)} labels up to {labels.max()}")
            except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
                what = " ".join(str(error).split()) or type(error).__name__
                reason = f"holds no whole {split} split of {data.source} ({what})"
                raise UserError(str(place), reason, hint="fetch it again") from error
            splits[split] = Arrays(images if images.ndim == 4 else images[..., None], labels, Fit.of(data))
    if data.source != "mnist":  # whose classes torchvision calls `0 - zero`
        class_names = tuple(found.classes)
    return Source(description, terms, class_names, splits)


def _place(data: DataConfig) -> Path:
    """The folder of the IDX files; of CIFAR-10 the archive, or the unpacked folder."""
    root = root_of(data)
    if data.source == "cifar10":
        places = [root] if root.is_file() else [root, root / _CIFAR_FOLDER, root / _CIFAR_ARCHIVE]
        found = next((place for place in places if place.is_file() or (place / _CIFAR_BATCH).is_file()), None)
        wanted = f"{_CIFAR_ARCHIVE}, nor {_CIFAR_FOLDER}"
    else:
        places = [root, root / "raw", root / _SETS[data.source][0] / "raw"]
        found = next((place for place in places if all(_idx_file(place, name) for name in _IDX_FILES)), None)
        wanted = f"{', '.join(_IDX_FILES)} (or .gz)"
    if found is None:
        hint = "put them there, or set data.download to true"
        raise NotFound("data.root", f"has no {wanted}", hint=hint, value=data.root)
    return found


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


@contextmanager
def _laid_out(place: Path, name: str, kind: Any) -> Iterator[Path]:
    """A temporary folder as torchvision wants it: it reads no archives, and no `.gz` files in a read-only folder."""
    with tempfile.TemporaryDirectory(prefix="ncsn-") as temporary:
        folder = Path(temporary)
        if name == "CIFAR10" and place.is_dir():
            (folder / _CIFAR_FOLDER).symlink_to(place.absolute())
        elif name == "CIFAR10":
            from torchvision.datasets.utils import check_integrity, extract_archive

            if not check_integrity(str(place), kind.tgz_md5):
                raise UserError(str(place), "is not the published archive, or damaged", hint="fetch it again")
            extract_archive(str(place), temporary)
        else:
            raw = folder / name / "raw"
            raw.mkdir(parents=True)
            for file in _IDX_FILES:
                path = _idx_file(place, file)
                assert path is not None
                if path.suffix != ".gz":
                    _require_idx_size(path, path.stat().st_size)
                    (raw / file).symlink_to(path.absolute())
                    continue
                try:
                    with gzip.open(path) as packed, (raw / file).open("wb") as unpacked:
                        while some := packed.read(1 << 20):
                            _require_idx_size(path, unpacked.tell() + len(some))
                            unpacked.write(some)
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise UserError(str(path), f"is a damaged gzip file ({error})", hint="fetch it again") from error
        yield folder


def _require_idx_size(path: Path, size: int) -> None:
    if size > _MOST_IDX_BYTES:
        raise UserError(str(path), f"holds more than {_MOST_IDX_BYTES:,} bytes", hint="fetch it again")
