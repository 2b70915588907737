"""Names, reads, writes and publishes bytes, on a local disk or in S3.

A URI is an absolute local path or `s3://bucket/prefix`. Addresses and keys come from the environment
(`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`). Everything is written under a
temporary name and published last, so that a reader never sees half of anything. A store in
S3 that is unavailable is waited for (`ncsn.storage.retry`).
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pyarrow import fs

from ncsn.errors import NotFound, UserError
from ncsn.storage import s3
from ncsn.storage.s3 import s3_filesystem

S3_SCHEME = s3.SCHEME

_SCRATCH = ".tmp-"


class UnreadableError(OSError):
    """A file of this project that is damaged: no mistake of whoever reads it, so never a `ValueError`."""


def absolute(uri: str) -> str:
    """Absolute form of a local path or an S3 URI, without a trailing slash.

    Raises:
        UserError: for a scheme other than s3, or an S3 URI without a bucket.
    """
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
    """Whether `uri` is a path on this machine's disk."""
    return not uri.startswith(S3_SCHEME)


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow filesystem of `uri` and the path inside it."""
    if is_local(uri):
        return fs.LocalFileSystem(), absolute(uri)
    bucket, _, key = uri.removeprefix(S3_SCHEME).partition("/")
    return _s3_filesystem(bucket), "/".join(part for part in (bucket, key) if part)


_s3_filesystem = functools.cache(s3_filesystem)


def exists(uri: str) -> bool:
    """Whether a file or folder stands at `uri`."""
    filesystem_, path = filesystem(uri)
    found: bool = filesystem_.get_file_info(path).type != fs.FileType.NotFound
    return found


def list_names(uri: str) -> list[str]:
    """Sorted names directly below the folder `uri`; empty if there is none."""
    filesystem_, path = filesystem(uri)
    selector = fs.FileSelector(path, allow_not_found=True)
    return sorted(info.base_name for info in filesystem_.get_file_info(selector))


def read_bytes(uri: str) -> bytes:
    """The whole file, as one writer left it.

    Raises:
        NotFound: if there is none.
    """
    try:
        return Path(absolute(uri)).read_bytes() if is_local(uri) else s3.get(uri)
    except FileNotFoundError:
        raise NotFound(uri, "no file here") from None


def read_text(uri: str) -> str:
    """The whole file as UTF-8."""
    return read_bytes(uri).decode()


def read_json(uri: str) -> Any:
    """The value in a JSON file that this project wrote.

    Raises:
        NotFound: if there is none.
        UnreadableError: if it is not JSON.
    """
    content = read_bytes(uri)
    try:
        return json.loads(content)
    except ValueError as error:
        raise UnreadableError(f"{uri} is not JSON: {error}") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Publish a file atomically, replacing what stood there."""
    if is_local(uri):
        with _temporary_sibling(uri) as temporary:
            temporary.write_bytes(data)
            _flush_to_disk(temporary)
            os.replace(temporary, uri)
    else:
        filesystem_, path = filesystem(uri)
        with filesystem_.open_output_stream(path) as stream:
            stream.write(data)


def write_text(uri: str, text: str) -> None:
    """Publish a UTF-8 file atomically."""
    write_bytes(uri, text.encode())


def write_array(uri: str, array: npt.NDArray[Any]) -> None:
    """Publish an array of numbers as a `.npy` file atomically."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(uri, buffer.getvalue())


def read_array(uri: str) -> npt.NDArray[Any]:
    """The array of a `.npy` file; one that would need unpickling is refused.

    Raises:
        NotFound: if there is none.
        ValueError: if it is not such a file.
    """
    array: npt.NDArray[Any] = np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False)
    return array


def delete_file(uri: str) -> None:
    """Delete a file; no error if there is none."""
    filesystem_, path = filesystem(uri)
    if filesystem_.get_file_info(path).type == fs.FileType.File:
        filesystem_.delete_file(path)


def delete_folder(uri: str) -> None:
    """Delete a folder and all in it; no error if there is none."""
    filesystem_, path = filesystem(uri)
    if filesystem_.get_file_info(path).type == fs.FileType.Directory:
        filesystem_.delete_dir(path)


def publish_file(file: Path, uri: str) -> None:
    """Publish a local file atomically, whatever its size; a local `uri` has to be on the same disk."""
    if is_local(uri):
        _flush_to_disk(file)
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, uri)
    else:
        remote, path = filesystem(uri)
        fs.copy_files(str(file), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=remote)


def publish_once(uri: str, data: bytes) -> bool:
    """Publish a file only if none stands there; of several writers exactly one succeeds.

    Returns:
        True if this call published it, False if there was one already. Where S3's answer is lost on the way and the
        request is repeated, the first try counts as "one already".
    """
    if is_local(uri):
        with _temporary_sibling(uri) as temporary:
            temporary.write_bytes(data)
            _flush_to_disk(temporary)
            try:
                os.link(temporary, uri)
            except FileExistsError:
                return False
        return True
    return s3.put_if_absent(uri, data)


@contextmanager
def staged_folder(uri: str, *, marker: str) -> Iterator[Path]:
    """A local folder to fill, published at `uri` when the block ends without an error.

    Readers take the file `marker` as the sign that the folder is complete: it is published last. If the block
    raises, nothing appears at `uri`. If another writer published first, theirs stays.
    """
    with scratch_folder(uri.rpartition("/")[0]) as staging:
        yield staging
        publish_folder(staging, uri, marker=marker)


@contextmanager
def scratch_folder(near: str) -> Iterator[Path]:
    """A private local folder, gone when the block ends; on the same disk as `near` if that is local."""
    scratch = new_scratch(near)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def new_scratch(near: str) -> Path:
    """A private local folder, the caller's to remove; on the same disk as `near` if that is local."""
    if not is_local(near):
        return Path(tempfile.mkdtemp(prefix="ncsn-"))
    scratch = Path(near) / f"{_SCRATCH}{uuid.uuid4().hex[:8]}"
    scratch.mkdir(parents=True)
    return scratch


def remove_scratch(near: str) -> None:
    """Remove the scratch folders that killed processes have left in the local folder `near`."""
    for left in Path(near).glob(f"{_SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)


def publish_folder(folder: Path, uri: str, *, marker: str, replace: bool = False) -> bool:
    """Publish a local folder at `uri`, complete as soon as the file `marker` stands in it.

    A local folder is moved and has to be on the same disk; `scratch_folder` gives one that is.

    Args:
        folder: What to publish.
        uri: Where.
        marker: Name of the file that makes it complete.
        replace: Whether to take the place of a complete one, which is not there for a moment then.

    Returns:
        True if this call published it, False if there was a complete one already, which stays.
    """
    if exists(join(uri, marker)):
        if not replace:
            return False
        _unpublish(uri, marker=marker)
    if not is_local(uri):
        return _upload_folder(folder, uri, marker=marker)
    for file in folder.rglob("*"):
        if file.is_file():
            _flush_to_disk(file)
    try:
        os.rename(folder, uri)
    except OSError:
        if not exists(join(uri, marker)):
            raise
        return False
    return True


def publish_staged(staging: str, uri: str, *, marker: str) -> bool:
    """Publish a folder that lies in the same store, complete as soon as the file `marker` stands in it.

    On a disk it is moved; in S3, which cannot move, its objects are copied by the server and `staging` stays.

    Returns:
        True if this call published it, False if there was a complete one already, which stays.
    """
    if is_local(uri):
        return publish_folder(Path(staging), uri, marker=marker)
    if exists(join(uri, marker)):
        return False
    (remote, source), (_, target) = filesystem(staging), filesystem(uri)
    for info in remote.get_file_info(fs.FileSelector(source, recursive=True)):
        if info.type == fs.FileType.File and info.path != join(source, marker):
            remote.copy_file(info.path, join(target, info.path.removeprefix(source)))
    return publish_once(join(uri, marker), read_bytes(join(staging, marker)))


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """The folder `uri` as a local folder: itself if it is local, else a temporary download."""
    if is_local(uri):
        if not Path(uri).is_dir():
            raise NotFound(uri, "no folder here")
        yield Path(uri)
        return
    if not list_names(uri):
        raise NotFound(uri, "no folder here")
    with tempfile.TemporaryDirectory(prefix="ncsn-") as name:
        filesystem_, path = filesystem(uri)
        fs.copy_files(path, name, source_filesystem=filesystem_, destination_filesystem=fs.LocalFileSystem())
        yield Path(name)


def _unpublish(uri: str, *, marker: str) -> None:
    if is_local(uri):
        with scratch_folder(uri.rpartition("/")[0]) as old:
            os.rename(uri, old / "old")
    else:
        delete_file(join(uri, marker))


def _upload_folder(folder: Path, uri: str, *, marker: str) -> bool:
    local, (remote, target) = fs.LocalFileSystem(), filesystem(uri)
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file != folder / marker:
            key = join(target, file.relative_to(folder).as_posix())
            fs.copy_files(str(file), key, source_filesystem=local, destination_filesystem=remote)
    return publish_once(join(uri, marker), (folder / marker).read_bytes())


def _flush_to_disk(file: Path) -> None:
    """Force the bytes out, so that after a power failure no published name stands for an empty file."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def _temporary_sibling(uri: str) -> Iterator[Path]:
    target = Path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
