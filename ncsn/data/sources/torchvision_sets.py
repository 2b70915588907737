"""MNIST, Fashion-MNIST and CIFAR-10, read by torchvision, which checks the digest of what it unpickles."""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ncsn.config.schema import DataConfig
from ncsn.data.format import SPLITS
from ncsn.data.pixels import Fit
from ncsn.data.sources.base import Arrays, Source
from ncsn.data.sources.listing import root_of
from ncsn.errors import NotFound, UserError


class _Set(NamedTuple):
    name: str  # of its class in torchvision
    description: str
    license: str


_SETS = {
    "mnist": _Set("MNIST", "MNIST handwritten digits, Y. LeCun, C. Cortes and C. Burges, 28x28 gray", "CC BY-SA 3.0"),
    "fashion_mnist": _Set(
        "FashionMNIST",
        "Fashion-MNIST articles of clothing, H. Xiao, K. Rasul and R. Vollgraf 2017, 28x28 gray",
        "MIT",
    ),
    "cifar10": _Set(
        "CIFAR10",
        "CIFAR-10, A. Krizhevsky 2009, 32x32 RGB",
        "no licence stated by its authors; collected from the web",
    ),
}
_IDX_FILES = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
_CIFAR_ARCHIVE, _CIFAR_FOLDER, _CIFAR_BATCH = "cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1"


def open_torchvision(data: DataConfig) -> Source:
    """One of the sets from data.root, into which it is downloaded first if data.download says so."""
    from torchvision import datasets

    this = _SETS[data.source]
    kind = getattr(datasets, this.name)
    if data.download and data.root is not None:
        _download(data, this, kind)
    place, splits = _place(data), {}
    class_names: tuple[str, ...] = tuple("0123456789")
    with _laid_out(place, this, kind) as folder:
        for split in SPLITS:
            try:
                found = kind(str(folder), train=split == "train")
                images, labels = np.asarray(found.data), np.asarray(found.targets, np.int64)
                if len(images) != len(labels) or labels.min() < 0 or labels.max() >= len(class_names):
                    raise ValueError(f"{len(images)} images, {len(labels)} labels up to {labels.max()}")
            except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    str(place), f"holds no whole {split} split of {data.source} ({reason})", hint="fetch it again"
                ) from error
            splits[split] = Arrays(images if images.ndim == 4 else images[..., None], labels, Fit.of(data))
    if data.source != "mnist":  # whose classes torchvision calls `0 - zero`
        class_names = tuple(found.classes)
    return Source(this.description, this.license, class_names, splits)


def _place(data: DataConfig) -> Path:
    """The folder of the IDX files; of CIFAR-10 the archive, or the unpacked folder."""
    root = root_of(data)
    if data.source == "cifar10":
        places = [root] if root.is_file() else [root, root / _CIFAR_FOLDER, root / _CIFAR_ARCHIVE]
        found = next((place for place in places if place.is_file() or (place / _CIFAR_BATCH).is_file()), None)
        wanted = f"{_CIFAR_ARCHIVE}, nor {_CIFAR_FOLDER}"
    else:
        places = [root, root / "raw", root / _SETS[data.source].name / "raw"]
        found = next((place for place in places if all(_idx_file(place, name) for name in _IDX_FILES)), None)
        wanted = f"{', '.join(_IDX_FILES)} (or .gz)"
    if found is None:
        hint = "put them there, or set data.download to true"
        raise NotFound("data.root", f"has no {wanted}", hint=hint, value=data.root)
    return found


def _idx_file(folder: Path, name: str) -> Path | None:
    names = [name, name.replace("-idx", ".idx")]
    return next((path for one in names for path in (folder / one, folder / f"{one}.gz") if path.is_file()), None)


@contextmanager
def _laid_out(place: Path, this: _Set, kind: Any) -> Iterator[Path]:
    """A temporary folder as torchvision wants it: it reads no archives, and no `.gz` files in a read-only folder."""
    with tempfile.TemporaryDirectory(prefix="ncsn-") as name:
        folder = Path(name)
        if this.name == "CIFAR10" and place.is_dir():
            (folder / _CIFAR_FOLDER).symlink_to(place.absolute())
        elif this.name == "CIFAR10":
            from torchvision.datasets.utils import check_integrity, extract_archive

            if not check_integrity(str(place), kind.tgz_md5):
                raise UserError(str(place), "is not the published archive, or damaged", hint="fetch it again")
            extract_archive(str(place), name)
        else:
            raw = folder / this.name / "raw"
            raw.mkdir(parents=True)
            for file in _IDX_FILES:
                path = _idx_file(place, file)
                assert path is not None
                if path.suffix != ".gz":
                    (raw / file).symlink_to(path.absolute())
                    continue
                try:
                    with gzip.open(path) as packed, (raw / file).open("wb") as unpacked:
                        shutil.copyfileobj(packed, unpacked)
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise UserError(str(path), f"is a damaged gzip file ({error})", hint="fetch it again") from error
        yield folder


def _download(data: DataConfig, this: _Set, kind: Any) -> None:
    """Download what is not there, with its digest verified."""
    with suppress(NotFound):
        _place(data)
        return
    root = Path(str(data.root)).expanduser()
    try:
        kind(str(root), download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(f"torchvision could not download {this.name} into {root}: {reason}") from error
