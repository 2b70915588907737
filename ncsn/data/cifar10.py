"""CIFAR-10 from its Python pickles or its binary files, in a folder or in the .tar.gz as it is published."""

from __future__ import annotations

import io
import lzma
import pickle
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ncsn.config.schema import DataConfig
from ncsn.data.source import Example, Source, Split, fit_of, root_of, safe_member
from ncsn.errors import NotFound, UserError

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_SHAPE = (3, 32, 32)
_PIXELS = 3072
_FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin")
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    MemoryError,
)  # fmt: skip

_BROKEN_ARCHIVE = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class _Batch:
    """A batch in a file of its own, and its name for messages."""

    name: str
    path: Path


# Gives the batches of these names while its block lasts.
_Opener = Callable[[Sequence[str]], AbstractContextManager[list[_Batch]]]


def open_cifar10(data: DataConfig) -> Source:
    """CIFAR-10 from data.root: the archive, a folder that holds it, or its unpacked folder."""
    if data.download and data.root is not None:
        _download(Path(data.root).expanduser())
    batches = _locate(root_of(data))
    return Source(
        description="CIFAR-10, A. Krizhevsky 2009, 32x32 RGB",
        license="no licence stated by its authors; collected from the web",
        class_names=_CLASSES,
        splits={split: _open_split(data, names, batches) for split, names in _BATCHES.items()},
    )


def parse_pickle(content: bytes, *, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one pickled batch with an unpickler that builds nothing but numpy arrays and plain values.

    Returns:
        uint8 [N, 3, 32, 32] and int64 [N].

    Raises:
        UserError: if the pickle asks for anything else, or is not a CIFAR-10 batch.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except _ForbiddenGlobalError as error:
        raise UserError(
            name, f"is refused: {error}", hint="fetch the archive again from a source that you trust"
        ) from error
    except _DAMAGED as error:
        raise UserError(
            name, f"is not a CIFAR-10 batch or is truncated ({error})", hint="fetch the archive again"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != _PIXELS or labels.dtype.kind not in "iu":
        raise UserError(name, f"is not a CIFAR-10 batch: expected uint8 data [N, {_PIXELS}] and whole-number labels")
    if labels.shape != images.shape[:1]:
        raise UserError(name, f"holds {len(images)} images but {labels.size} labels", hint="fetch the archive again")
    return images.reshape(-1, *_SHAPE), labels.astype(np.int64)


def parse_binary(content: bytes, *, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one batch of the binary version: records of a label byte and 3072 pixel bytes.

    Returns:
        uint8 [N, 3, 32, 32] and int64 [N].

    Raises:
        UserError: if the size is not a whole number of records.
    """
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


def _open_split(data: DataConfig, names: Sequence[str], batches: _Opener) -> Split:
    fit = fit_of(data)

    def stream() -> Iterator[Example]:
        with batches(names) as opened:
            for batch in opened:
                parse = parse_binary if batch.name.endswith(".bin") else parse_pickle
                images, labels = parse(batch.path.read_bytes(), name=batch.name)
                _check_labels(labels, batch.name)
                for index, (image, label) in enumerate(zip(images.transpose(0, 2, 3, 1), labels.tolist(), strict=True)):
                    yield Example(fit.array(image, name=f"image {index} of {batch.name}"), label)

    # Only reading a batch tells how many images it holds; the published ones have 10,000 each.
    return Split(10_000 * len(names), stream)


def _check_labels(labels: np.ndarray, name: str) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(_CLASSES)))
    if wrong.size:
        raise UserError(name, f"gives image {wrong[0]} label {labels[wrong[0]]}; labels are 0 to {len(_CLASSES) - 1}")


def _locate(root: Path) -> _Opener:
    if root.is_file():
        return _archive_batches(root)
    for folder in (root / name for name in _FOLDERS):
        found = _folder_batches(folder)
        if found:
            return lambda names: nullcontext([found[name] for name in names])
    for archive in (root / name for name in _ARCHIVES):
        if archive.is_file():
            return _archive_batches(archive)
    raise NotFound(
        "data.root",
        f"expected {_ARCHIVES[0]} or {_ARCHIVES[1]}, or their folder with data_batch_1 to 5 and test_batch",
        hint="put one there, or set data.download to true",
        value=str(root),
    )


def _folder_batches(folder: Path) -> dict[str, _Batch]:
    names = [name for group in _BATCHES.values() for name in group]
    for suffix in ("", ".bin"):
        paths = {name: folder / f"{name}{suffix}" for name in names}
        missing = [path for path in paths.values() if not path.is_file()]
        if not missing:
            return {name: _Batch(str(path), path) for name, path in paths.items()}
        if len(missing) < len(names):
            raise NotFound(
                str(missing[0]), "is missing, so that CIFAR-10 is incomplete", hint="unpack the archive again"
            )
    return {}


def _archive_batches(archive: Path) -> _Opener:
    wanted = {name for group in _BATCHES.values() for name in group}
    members = {}
    for name, _ in _read_members(archive, ()):
        members[Path(name).name.removesuffix(".bin")] = name
    missing = sorted(wanted - members.keys())
    if missing:
        raise UserError(str(archive), f"is not CIFAR-10: it holds no {missing[0]}", hint="fetch it again")
    return lambda names: _unpacked(archive, [members[name] for name in names])


@contextmanager
def _unpacked(archive: Path, members: Sequence[str]) -> Iterator[list[_Batch]]:
    """The members in temporary files: the archive can only be read from its start, and has them in another order."""
    with tempfile.TemporaryDirectory(prefix="ncsn-cifar-") as folder:
        batches = {name: _Batch(f"{archive}:{name}", Path(folder) / Path(name).name) for name in members}
        for name, content in _read_members(archive, members):
            if name in batches:
                batches[name].path.write_bytes(content)
        yield list(batches.values())


def _read_members(archive: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Name of each file in the archive, and the content of those in `names`, in one pass."""
    members = _walk(archive, names)
    while True:
        try:
            member = next(members, None)
        except _BROKEN_ARCHIVE as error:
            raise _damaged_archive(archive, error) from error
        if member is None:
            return
        yield member


def _walk(archive: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive, "r|*") as tar:
        for member in tar:
            safe_member(member.name, archive=archive)
            stream = tar.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream.read() if member.name in names else b""


def _damaged_archive(archive: Path, error: BaseException) -> UserError:
    return UserError(str(archive), f"is not a whole tar archive ({error})", hint="fetch it again")


def _download(root: Path) -> None:
    """Fetch the archive with its checksum verified; it is read in place and never unpickled by torchvision."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    archive = any((root / name).is_file() for name in _ARCHIVES[1:])
    if root.is_file() or archive or any(_folder_batches(root / folder) for folder in _FOLDERS):
        return
    try:
        download_url(CIFAR10.url, str(root), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"torchvision could not download CIFAR-10 into {root}: {reason}; put {CIFAR10.filename} there by hand"
        ) from error


class _ForbiddenGlobalError(pickle.UnpicklingError):
    """The pickle names a function or class that a CIFAR-10 batch has no use for."""


def _empty_array(_kind: type[np.ndarray], _shape: tuple[int, ...], _typecode: bytes) -> np.ndarray:
    """Stands in for numpy's _reconstruct: the array's state follows and sets its shape, so the arguments are unused."""
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def _latin1(text: str, _encoding: str) -> bytes:
    """Stands in for _codecs.encode, by which Python 3 writes bytes in old protocols."""
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
