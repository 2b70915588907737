"""The store: names, reads, writes and publishes bytes, on a local disk or in S3.

A URI is an absolute local path or `s3://bucket/prefix`. Addresses and keys come from the environment
(`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`). Everything is written under a
temporary name and published last, so that a reader never sees half of it. Calls to S3 are repeated while it is
unavailable (`ncsn.storage.retry`).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pyarrow import fs

from ncsn.errors import NotFound, UserError
from ncsn.storage.retry import S3_SCHEME

CACHE_DIR_VARIABLE = "NCSN_CACHE_DIR"

DIGEST = re.compile(r"[0-9a-f]{8,64}")  # of what has one
TEMPORARY = r"\.[^/]*tmp-[0-9a-f]{8}|\.parts-[0-9a-f]{16}"  # pattern of the names of what is not published yet
_SCRATCH = ".tmp-"
_STORE = "store:/"  # stands for the root in the files of a store, which may be moved


class UnreadableError(OSError):
    """A damaged file of this project. Not the user's mistake."""


def absolute(uri: str) -> str:
    """A local path or an S3 URI in absolute form, without a trailing slash."""
    if "\0" in uri:
        raise UserError(repr(uri), "contains a null character", hint="use a local path or s3://bucket/prefix")
    if uri.startswith(S3_SCHEME):
        if not uri.removeprefix(S3_SCHEME).strip("/"):
            raise UserError(uri, "names no bucket", hint="use s3://bucket/prefix")
        return uri.rstrip("/")
    if "://" in uri and not uri.startswith("file://"):
        raise UserError(uri, "unknown scheme", hint="use a local path or s3://bucket/prefix")
    return str(Path(uri.removeprefix("file://")).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` appended, separated by single slashes."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    return not uri.startswith(S3_SCHEME)


def _s3() -> Any:
    """What S3 needs, which a process with a local store does not load."""
    from ncsn.storage import s3

    return s3


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of `uri` and the path inside it."""
    if is_local(uri):
        return fs.LocalFileSystem(), absolute(uri)
    bucket, _, key = uri.removeprefix(S3_SCHEME).partition("/")
    return _s3().bucket_filesystem(bucket), "/".join(part for part in (bucket, key) if part)


def exists(uri: str) -> bool:
    filesystem_, path = filesystem(uri)
    found: bool = filesystem_.get_file_info(path).type != fs.FileType.NotFound
    return found


def is_file(uri: str) -> bool:
    filesystem_, path = filesystem(uri)
    return bool(filesystem_.get_file_info(path).is_file)


def list_names(uri: str) -> list[str]:
    return sorted(entry.path for entry in list_entries(uri))


class Entry(NamedTuple):
    """A file or folder of the store."""

    path: str  # below the folder that was listed
    size: int  # bytes; 0 of a folder
    changed: float  # seconds since 1970; 0 of a folder in S3, which has no date
    is_file: bool


def list_entries(uri: str, *, files: bool = False) -> list[Entry]:
    """What is in a folder; with `files` all files below it at any depth, and no folders. Empty if there is none."""
    filesystem_, path = filesystem(uri)
    found = filesystem_.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=files))
    return [
        Entry(info.path.removeprefix(f"{path}/"), info.size or 0, (info.mtime_ns or 0) / 1e9, info.is_file)
        for info in found
        if info.is_file or not files
    ]


def read_bytes(uri: str, *, check: Callable[[int], object] = lambda _: None) -> bytes:
    """The whole file, as one writer left it; `NotFound` if there is none.

    `check` gets its size before it is read, and may raise.
    """
    try:
        if not is_local(uri):
            content: bytes = _s3().get(uri, check)
            return content
        with open(absolute(uri), "rb") as file:  # noqa: PTH123  # pathlib would take a tenth of what a small JPEG does
            check(os.fstat(file.fileno()).st_size)
            return file.read()
    except FileNotFoundError:
        raise NotFound(uri, "no such file") from None


def read_below(root: str, uri: str) -> bytes:
    """The file, which a record of the store names that others may have written: `UserError` if it is not below it."""
    if not uri.startswith(f"{root.rstrip('/')}/") or ".." in uri.split("/"):
        raise UserError(uri, f"is no file of the store {root}, though a record there says so", hint="do the step again")
    return read_bytes(uri)


def read_text(uri: str) -> str:
    return read_bytes(uri).decode()


def read_json(uri: str) -> Any:
    """The value in a JSON file; `NotFound` if there is none, `UnreadableError` if it is not JSON."""
    content = read_bytes(uri)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{uri} is not JSON: {error}") from error


def find_json(uri: str) -> Any | None:
    """The value in a JSON file, or None if there is no file."""
    try:
        return read_json(uri)
    except FileNotFoundError:
        return None


def relative_uris(values: Any, root: str) -> Any:
    """Plain values with each URI at or below the root of a store as `store:/...`, for its files and for digests.

    The inverse is `absolute_uris`, where the store is then.
    """
    inside = f"{root}/"
    return _map_texts(
        values, lambda text: _STORE + text[len(inside) :] if text == root or text.startswith(inside) else text
    )


def absolute_uris(values: Any, root: str) -> Any:
    """The inverse of `relative_uris`, in the store at `root`."""
    return _map_texts(
        values, lambda text: join(root, text.removeprefix(_STORE)).rstrip("/") if text.startswith(_STORE) else text
    )


def _map_texts(values: Any, change: Callable[[str], str]) -> Any:
    """Plain values with each text in them changed, but for keys."""
    if isinstance(values, str):
        return change(values)
    if isinstance(values, Mapping):
        return {key: _map_texts(value, change) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_map_texts(value, change) for value in values]
    return values


def digest(values: Any, length: int) -> str:
    """The first `length` hex digits of the SHA-256 of plain values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:length]


def write_bytes(uri: str, data: bytes) -> None:
    """Publish a file atomically, in place of an older one."""
    if is_local(uri):
        with local_file(Path(uri)) as temporary:
            temporary.write_bytes(data)
            _flush_to_disk(temporary)
    else:
        _s3().put(uri, io.BytesIO(data))


def write_text(uri: str, text: str) -> None:
    write_bytes(uri, text.encode())


def write_json(uri: str, values: Any, *, indent: int | None = None) -> None:
    write_text(uri, json.dumps(values, indent=indent))


def write_array(uri: str, array: npt.NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(uri, buffer.getvalue())


def read_array(uri: str) -> npt.NDArray[Any]:
    """The array in a `.npy` file; `UnreadableError` if it is none, or would need unpickling."""
    content = read_bytes(uri)
    try:
        array: npt.NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UnreadableError(f"{uri} is not an array: {error}") from error
    return array


def mapped(path: Path) -> npt.NDArray[Any]:
    """The array in a local `.npy` file, which stays there."""
    array: np.memmap = np.load(path, mmap_mode="r")
    return array.view(np.ndarray)  # gathering a batch from an `np.memmap` is slower


def delete(uri: str) -> None:
    """Delete a file, or a folder with its content; no error if there is none."""
    filesystem_, path = filesystem(uri)
    kind = filesystem_.get_file_info(path).type
    if kind == fs.FileType.File:
        filesystem_.delete_file(path)
    elif kind == fs.FileType.Directory:
        filesystem_.delete_dir(path)


def publish_file(file: Path, uri: str) -> None:
    """Publish a local file of any size atomically; a local `uri` has to be on the same disk."""
    if is_local(uri):
        _flush_to_disk(file)
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, uri)
    else:
        # Not by Arrow's `copy_files`, which hides an error of the last write.
        with file.open("rb") as stream:
            _s3().put(uri, stream)


def publish_once(uri: str, data: bytes) -> bool:
    """Publish a file unless there is one; whether this call did. Of several writers exactly one succeeds."""
    # Where S3's answer to a write is lost and the request is repeated, the first write counts as another's.
    if not is_local(uri):
        made: bool = _s3().put_if_absent(uri, data)
        return made
    with scratch_folder(str(Path(uri).parent)) as folder:
        write_bytes(str(folder / "file"), data)
        try:
            os.link(folder / "file", uri)
        except FileExistsError:
            return False
    return True


@contextmanager
def staged_folder(uri: str, *, marker: str) -> Iterator[Path]:
    """A local folder to fill, published at `uri` when the block ends without an error.

    The file `marker`, which is published last, makes the folder complete. If another writer was first, theirs stays.
    """
    with scratch_folder(uri.rpartition("/")[0]) as staging:
        yield staging
        publish_folder(staging, uri, marker=marker)


@contextmanager
def scratch_folder(near: str) -> Iterator[Path]:
    """A temporary local folder, removed when the block ends; on the same disk as `near` if that is local."""
    if is_local(near):
        scratch = Path(near) / f"{_SCRATCH}{uuid.uuid4().hex[:8]}"
        scratch.mkdir(parents=True)
    else:
        scratch = Path(tempfile.mkdtemp(prefix="ncsn-"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_scratch(near: str) -> None:
    """Remove the scratch folders that killed processes have left in the local folder `near`."""
    for left in Path(near).glob(f"{_SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)


def publish_folder(folder: Path | str, uri: str, *, marker: str, replace: bool = False) -> bool:
    """Publish a folder at `uri` unless there is a complete one; whether this call did.

    The file `marker` makes it complete, and is published last. A folder on the same disk is moved, as one of
    `scratch_folder`; one on a disk is uploaded to S3, and one in S3 is copied there by the server and stays. With
    `replace` it takes the place of a complete one, and for a moment there is none.
    """
    if exists(join(uri, marker)):
        if not replace:
            return False
        if is_local(uri):
            with scratch_folder(uri.rpartition("/")[0]) as old:
                os.rename(uri, old / "old")
        else:
            delete(join(uri, marker))
    if not is_local(uri):
        (there, source), (_, target) = filesystem(str(folder)), filesystem(uri)
        for info in there.get_file_info(fs.FileSelector(source, recursive=True)):
            name = info.path.removeprefix(f"{source}/")
            if info.type == fs.FileType.File and name != marker and is_local(str(folder)):
                publish_file(Path(info.path), join(uri, name))
            elif info.type == fs.FileType.File and name != marker:
                there.copy_file(info.path, join(target, name))
        return publish_once(join(uri, marker), read_bytes(join(str(folder), marker)))
    for file in Path(folder).rglob("*"):
        if file.is_file():
            _flush_to_disk(file)
    try:
        os.rename(folder, uri)
    except OSError:
        if not exists(join(uri, marker)):
            raise
        return False
    return True


def make_store(root: str) -> None:
    """Make the folder of a local store if it is not there; who makes it first may read it, and nobody else."""
    if is_local(root) and not Path(root).exists():
        Path(root).parent.mkdir(parents=True, exist_ok=True)
        Path(root).mkdir(mode=0o700, exist_ok=True)


def require_output(key: str, uri: str, *, new: bool = True) -> None:
    """Refuse, before the work, a place for its output that cannot be written, or that is neither new nor empty."""
    if new and (is_file(uri) or list_names(uri)):
        raise UserError(key, "exists, and nothing is overwritten", hint="choose another", value=uri)
    if new and is_local(uri) and os.path.ismount(absolute(uri)):
        raise UserError(key, "is a mount point, which stays as it is", hint="choose a folder in it", value=uri)
    if is_local(uri):
        try:
            with tempfile.TemporaryDirectory(dir=next(each for each in Path(absolute(uri)).parents if each.exists())):
                return
        except OSError as error:
            raise UserError(key, f"cannot be written: {error.strerror}", hint="choose another", value=uri) from None
    write_bytes(probe := join(uri, f"{_SCRATCH}{uuid.uuid4().hex[:8]}"), b"")
    delete(probe)


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """The folder `uri` as a local folder: itself if it is local, else a temporary download."""
    if not (Path(uri).is_dir() if is_local(uri) else list_names(uri)):
        raise NotFound(uri, "no such folder")
    if is_local(uri):
        yield Path(uri)
        return
    with scratch_folder(uri) as folder:
        filesystem_, path = filesystem(uri)
        fs.copy_files(path, str(folder), source_filesystem=filesystem_, destination_filesystem=fs.LocalFileSystem())
        yield folder


def _flush_to_disk(file: Path) -> None:
    # After a power failure no published name is that of an empty file.
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def local_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write a file at, which becomes `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:  # of a write it names no file, and of a copy the one that is read
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """This node's folder for what can be made again: `NCSN_CACHE_DIR`, else `~/.cache/ncsn`."""
    return Path(os.environ.get(CACHE_DIR_VARIABLE) or "~/.cache/ncsn").expanduser()
