"""The small data sets: scikit-learn's digits, MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np

from ncsn.config.schema import DataConfig
from ncsn.data.source import Example, Source, Split, fit_of, held_out, root_of
from ncsn.errors import NotFound, UserError

_GZIP_MAGIC = b"\x1f\x8b"
_UINT8 = 0x08
_CHUNK_BYTES = 4 << 20
_LARGEST_SIDE = 4096
_PREFIXES = {"train": "train", "test": "t10k"}
_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class IdxFile:
    """An IDX file of uint8 whose header was read.

    Attributes:
        path: The file.
        shape: Its dimensions; the first counts the rows.
    """

    path: Path
    shape: tuple[int, ...]

    def chunks(self) -> Iterator[np.ndarray]:
        """The rows in their order, uint8 [k, *shape[1:]], a few megabytes at a time.

        Raises:
            UserError: if the file is shorter or longer than its header says, or its compression is damaged.
        """
        row_bytes = math.prod(self.shape[1:])
        rows = max(1, _CHUNK_BYTES // row_bytes)
        with _open(self.path) as stream:
            _read(stream, _header_bytes(len(self.shape)), self.path)
            for first in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - first)
                data = _read(stream, count * row_bytes, self.path)
                if len(data) < count * row_bytes:
                    raise self._wrong_length(first * row_bytes + len(data), "is truncated")
                yield np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])
            if _read(stream, 1, self.path):
                raise UserError(str(self.path), "holds more bytes than its header says", hint="fetch it again")

    def check_length(self) -> None:
        """Compare an uncompressed file's size with its header.

        Raises:
            UserError: if they disagree.
        """
        with self.path.open("rb") as stream:
            if stream.read(2) == _GZIP_MAGIC:
                return
        found = self.path.stat().st_size - _header_bytes(len(self.shape))
        if found != math.prod(self.shape):
            raise self._wrong_length(found, "is truncated" if found < math.prod(self.shape) else "is too long")

    def _wrong_length(self, found: int, what: str) -> UserError:
        sizes = " x ".join(str(size) for size in self.shape)
        return UserError(
            str(self.path),
            f"{what}: expected {sizes} = {math.prod(self.shape)} bytes after the header, found {found}",
            hint="fetch it again",
        )


def read_header(path: Path, *, dimensions: int) -> IdxFile:
    """Read and check the header of an IDX file.

    Args:
        path: The file, plain or gzipped.
        dimensions: 3 for images, 1 for labels.

    Raises:
        UserError: if it is not an IDX file of uint8 with that many dimensions.
    """
    size = _header_bytes(dimensions)
    with _open(path) as stream:
        data = _read(stream, size, path)
    if len(data) < size:
        raise UserError(
            str(path), f"is truncated: expected a header of {size} bytes, found {len(data)}", hint="fetch it again"
        )
    expected = (_UINT8 << 8) + dimensions
    magic, *shape = struct.unpack(f">{1 + dimensions}I", data)
    if magic != expected:
        raise UserError(
            str(path),
            f"another kind of file: starts with magic number 0x{magic:08x}, but IDX "
            f"{'images' if dimensions == 3 else 'labels'} start with 0x{expected:08x}",
        )
    if not all(1 <= side <= _LARGEST_SIDE for side in shape[1:]):
        raise UserError(
            str(path), f"says that its images have {shape[1]}x{shape[2]} pixels", hint="fetch it again, it is damaged"
        )
    return IdxFile(path, tuple(shape))


def open_mnist(data: DataConfig) -> Source:
    """MNIST from the folder data.root."""
    return _open_splits(
        data,
        torchvision_class="MNIST",
        description="MNIST handwritten digits, Y. LeCun, C. Cortes and C. Burges, 28x28 gray",
        license_="CC BY-SA 3.0",
        class_names=tuple("0123456789"),
    )


def open_fashion_mnist(data: DataConfig) -> Source:
    """Fashion-MNIST from the folder data.root."""
    return _open_splits(
        data,
        torchvision_class="FashionMNIST",
        description="Fashion-MNIST articles of clothing, H. Xiao, K. Rasul and R. Vollgraf 2017, 28x28 gray",
        license_="MIT",
        class_names=_FASHION,
    )


def _open_splits(
    data: DataConfig, *, torchvision_class: str, description: str, license_: str, class_names: tuple[str, ...]
) -> Source:
    paths = _locate(data, torchvision_class)
    splits = {
        split: _open_split(data, images=paths[split, "images"], labels=paths[split, "labels"], classes=len(class_names))
        for split in _PREFIXES
    }
    return Source(description=description, license=license_, class_names=class_names, splits=splits)


def _open_split(data: DataConfig, *, images: Path, labels: Path, classes: int) -> Split:
    image_file, label_file = read_header(images, dimensions=3), read_header(labels, dimensions=1)
    image_file.check_length()
    label_file.check_length()
    count = image_file.shape[0]
    if label_file.shape[0] != count:
        raise UserError(
            str(labels),
            f"holds {label_file.shape[0]} labels, but {images} holds {count} images",
            hint="fetch both again, they do not belong together",
        )
    fit = fit_of(data)

    def stream() -> Iterator[Example]:
        values = np.concatenate([np.empty(0, np.uint8), *label_file.chunks()])
        wrong = np.flatnonzero(values >= classes)
        if wrong.size:
            raise UserError(
                str(labels), f"gives image {wrong[0]} label {values[wrong[0]]}; labels are 0 to {classes - 1}"
            )
        first = 0
        for chunk in image_file.chunks():
            labels_of_chunk = values[first : first + len(chunk)].tolist()
            rows: Iterable[np.ndarray] = chunk[..., None]
            if not fit.keeps((*chunk.shape[1:], 1)):
                rows = (fit.array(row, name=f"image {first + k} of {images}") for k, row in enumerate(chunk[..., None]))
            yield from map(Example, rows, labels_of_chunk)
            first += len(chunk)

    return Split(count, stream)


def _locate(data: DataConfig, torchvision_class: str) -> dict[tuple[str, str], Path]:
    """The four files below data.root: in it, in its `raw`, or where torchvision puts them."""
    if data.download and data.root is not None:
        root = Path(data.root).expanduser()
        if _missing(_found(root, torchvision_class)):
            _download(root, torchvision_class)
    root = root_of(data)
    found = _found(root, torchvision_class)
    missing = _missing(found)
    if missing:
        split, kind = missing[0]
        raise NotFound(
            "data.root",
            f"has no {_file_names(split, kind)[0]} (or .gz), nor has its folder raw or {torchvision_class}/raw",
            hint=f"put the four IDX files of {data.source} there, or set data.download to true",
            value=data.root,
        )
    return {key: path for key, path in found.items() if path is not None}


def _found(root: Path, torchvision_class: str) -> dict[tuple[str, str], Path | None]:
    folders = (root, root / "raw", root / torchvision_class / "raw")
    found = {}
    for split in _PREFIXES:
        for kind in ("images", "labels"):
            candidates = (folder / name for folder in folders for name in _file_names(split, kind))
            found[split, kind] = next((path for path in candidates if path.is_file()), None)
    return found


def _missing(found: dict[tuple[str, str], Path | None]) -> list[tuple[str, str]]:
    return [key for key, path in found.items() if path is None]


def _file_names(split: str, kind: str) -> Sequence[str]:
    suffix = "idx3-ubyte" if kind == "images" else "idx1-ubyte"
    stem = f"{_PREFIXES[split]}-{kind}"
    return [f"{stem}{dot}{suffix}{gz}" for dot in ("-", ".") for gz in ("", ".gz")]


def _download(root: Path, torchvision_class: str) -> None:
    from torchvision import datasets

    try:
        getattr(datasets, torchvision_class)(root=str(root), train=True, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"torchvision could not download {torchvision_class} into {root}: {reason}; "
            "put its four IDX files into data.root by hand"
        ) from error


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    with path.open("rb") as stream:
        compressed = stream.read(2) == _GZIP_MAGIC
    return gzip.open(path, "rb") if compressed else path.open("rb")


def _read(stream: gzip.GzipFile | BufferedReader, size: int, path: Path) -> bytes:
    """Up to `size` bytes; fewer only at the end. What a cut gzip file still gives counts."""
    data = bytearray()
    try:
        while len(data) < size:
            # read1 hands over what a cut gzip file gives before its error; read would lose it.
            piece = stream.read1(size - len(data))
            if not piece:
                break
            data += piece
    except EOFError:
        pass
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(str(path), f"is a damaged gzip file ({error})", hint="fetch it again") from error
    return bytes(data)


def _header_bytes(dimensions: int) -> int:
    return 4 + 4 * dimensions


_LARGEST_INK = 16


def open_digits(data: DataConfig) -> Source:
    """The digits, their ink 0..16 spread over 0..255, with a share held out for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.floor(digits.images * (255 / _LARGEST_INK) + 0.5).astype(np.uint8)[..., None]
    labels = digits.target.astype(int).tolist()
    test = held_out([f"digit {index}" for index in range(len(labels))], labels, data.test_fraction)
    fit = fit_of(data)

    def split(indices: np.ndarray) -> Split:
        def stream() -> Iterator[Example]:
            for index in indices:
                yield Example(fit.array(images[index], name=f"digit {index}"), labels[index])

        return Split(len(indices), stream)

    return Source(
        description="Optical Recognition of Handwritten Digits (test part), E. Alpaydin and C. Kaynak 1998, 8x8 gray",
        license="CC BY 4.0 (UCI Machine Learning Repository); shipped with scikit-learn",
        class_names=tuple(str(name) for name in digits.target_names),
        splits={"train": split(np.flatnonzero(~test)), "test": split(np.flatnonzero(test))},
    )
