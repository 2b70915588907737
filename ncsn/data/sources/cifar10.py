"""CIFAR-10 from its Python pickles or its binary files, in a folder or in the .tar.gz as it is published."""

from __future__ import annotations

import io
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ncsn.config.schema import DataConfig
from ncsn.data.pixels import Fit
from ncsn.data.sources.base import Source
from ncsn.data.sources.in_memory import Arrays, downloading, require_labels
from ncsn.data.sources.listing import root_of, safe_member
from ncsn.errors import NotFound, UserError

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_ALL_BATCHES = [name for names in _BATCHES.values() for name in names]
_FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin")
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_SHAPE = (3, 32, 32)
_PIXELS = 3072
_NOT_A_BATCH = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    MemoryError,
)  # fmt: skip
_BROKEN_ARCHIVE = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)

_Batch = tuple[str, bytes]  # its path, and what it holds


def open_cifar10(data: DataConfig) -> Source:
    """CIFAR-10 from data.root: the archive, a folder that holds it, or its unpacked folder."""
    if data.download and data.root is not None:
        _fetch(Path(data.root).expanduser())
    batches = _read_batches(root_of(data))
    splits = {}
    for split, names in _BATCHES.items():
        images, labels = zip(*(_parse_batch(*batches.pop(name)) for name in names), strict=True)
        channels_last = np.concatenate(images).transpose(0, 2, 3, 1)
        splits[split] = Arrays(channels_last, np.concatenate(labels), Fit.of(data))
    return Source(
        description="CIFAR-10, A. Krizhevsky 2009, 32x32 RGB",
        license="no licence stated by its authors; collected from the web",
        class_names=_CLASSES,
        splits=splits,
    )


def locate_cifar10(data: DataConfig) -> str:
    """The archive, or the unpacked folder."""
    return str(_place(root_of(data)))


def _read_batches(root: Path) -> dict[str, _Batch]:
    place = _place(root)
    if place.is_file():
        return _batches_of_archive(place)
    return {name: (str(path), path.read_bytes()) for name, path in _batch_files(place).items()}


def _place(root: Path) -> Path:
    if root.is_file():
        return root
    for name in _FOLDERS:
        if _batch_files(root / name):
            return root / name
    for name in _ARCHIVES:
        if (root / name).is_file():
            return root / name
    raise NotFound(
        "data.root",
        f"expected {_ARCHIVES[0]} or {_ARCHIVES[1]}, or their folder with data_batch_1 to 5 and test_batch",
        hint="put one there, or set data.download to true",
        value=str(root),
    )


def _batch_files(folder: Path) -> dict[str, Path]:
    for suffix in ("", ".bin"):
        paths = {name: folder / f"{name}{suffix}" for name in _ALL_BATCHES}
        missing = [path for path in paths.values() if not path.is_file()]
        if not missing:
            return paths
        if len(missing) < len(paths):
            raise NotFound(
                str(missing[0]), "is missing, so that CIFAR-10 is incomplete", hint="unpack the archive again"
            )
    return {}


def _batches_of_archive(archive: Path) -> dict[str, _Batch]:
    batches = {}
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                name = safe_member(member.name, archive=archive).name.removesuffix(".bin")
                content = tar.extractfile(member) if name in _ALL_BATCHES else None
                if content is not None:
                    batches[name] = (f"{archive}:{member.name}", content.read())
    except _BROKEN_ARCHIVE as error:
        raise UserError(str(archive), f"is not a whole tar archive ({error})", hint="fetch it again") from error
    for name in _ALL_BATCHES:
        if name not in batches:
            raise UserError(str(archive), f"is not CIFAR-10: it holds no {name}", hint="fetch it again")
    return batches


def _parse_batch(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (parse_binary if name.endswith(".bin") else parse_pickle)(content, name=name)
    require_labels(labels, num_classes=len(_CLASSES), name=name)
    return images, labels


def parse_binary(content: bytes, *, name: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 3, 32, 32] and int64 [N] of a batch of records, each a label byte and 3072 pixel bytes."""
    record = 1 + _PIXELS
    if not content or len(content) % record:
        rows = len(content) // record
        raise UserError(
            name,
            f"is truncated: expected a multiple of {record} bytes, found {len(content)} ({rows} images and "
            f"{len(content) - rows * record} bytes)",
            hint="fetch the archive again",
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, 1:].reshape(-1, *_SHAPE), records[:, 0].astype(np.int64)


def parse_pickle(content: bytes, *, name: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 3, 32, 32] and int64 [N] of a pickled batch, which may build numpy arrays and plain values only."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except _ForbiddenGlobalError as error:
        raise UserError(
            name, f"is refused: {error}", hint="fetch the archive again from a source that you trust"
        ) from error
    except _NOT_A_BATCH as error:
        raise UserError(
            name, f"is not a CIFAR-10 batch or is truncated ({error})", hint="fetch the archive again"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != _PIXELS or labels.dtype.kind not in "iu":
        raise UserError(name, f"is not a CIFAR-10 batch: expected uint8 data [N, {_PIXELS}] and whole-number labels")
    if labels.shape != images.shape[:1]:
        raise UserError(name, f"holds {len(images)} images but {labels.size} labels", hint="fetch the archive again")
    return images.reshape(-1, *_SHAPE), labels.astype(np.int64)


class _ForbiddenGlobalError(pickle.UnpicklingError):
    pass


def _empty_array(_kind: type[np.ndarray], _shape: tuple[int, ...], _typecode: bytes) -> np.ndarray:
    # In place of numpy's _reconstruct. The array's state follows and sets its shape, so no argument is needed, and
    # none can claim memory.
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def _latin1(text: str, _encoding: str) -> bytes:
    # In place of _codecs.encode, by which Python 3 writes bytes in old protocols.
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    _ALLOWED: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("numpy._core.multiarray", "_reconstruct"): _empty_array,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Only what rebuilds a numpy array."""
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise _ForbiddenGlobalError(
                f"its pickle asks for {module}.{name}, which image data does not need"
            ) from None


def _fetch(root: Path) -> None:
    """Fetch the archive with its checksum verified; it is read in place and never unpickled by torchvision."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    archive = any((root / name).is_file() for name in _ARCHIVES[1:])
    if root.is_file() or archive or any(_batch_files(root / folder) for folder in _FOLDERS):
        return
    with downloading("CIFAR-10", CIFAR10.filename, root):
        download_url(CIFAR10.url, str(root), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
