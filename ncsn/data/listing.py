"""The files below a folder or the objects of a bucket."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pyarrow import fs

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.errors import NotFound, UserError

_REFUSED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE", "CREDENTIALS", "FORBIDDEN")


class Listed(NamedTuple):
    """A file: its path below the root, its bytes, and when it was changed in nanoseconds."""

    path: str
    size: int
    changed: int


def list_files(root: str) -> list[Listed]:
    """All files below `root` but the hidden ones, sorted by path; `root` itself, by its name, if it is a file.

    Args:
        root: A local path or an S3 URI.

    Raises:
        NotFound: if nothing stands there.
        UserError: if the bucket refuses the keys of the environment.
        OSError: if it cannot be reached.
    """
    return sorted(_local(Path(root)) if storage.is_local(root) else _in_bucket(root))


def _local(root: Path) -> Iterator[Listed]:
    if not root.exists():
        raise NotFound("data.root", "does not exist", hint="set it to where the images are", value=str(root))
    if root.is_file():
        yield _listed(root, root.name)
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield _listed(path, path.relative_to(root).as_posix())


def _listed(path: Path, name: str) -> Listed:
    status = path.stat()
    return Listed(name, status.st_size, status.st_mtime_ns)


def _in_bucket(root: str) -> Iterator[Listed]:
    try:
        filesystem, path = storage.filesystem(root)
        (info,) = filesystem.get_file_info([path])
        if info.type == fs.FileType.File:
            yield Listed(info.base_name, info.size, info.mtime_ns or 0)
            return
        infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    except FileNotFoundError:
        raise NotFound("data.root", "does not exist", hint="set it to where the images are", value=root) from None
    except OSError as error:
        raise _unreadable(root, error) from error
    for info in infos:
        name = info.path.removeprefix(f"{path}/")
        if info.type == fs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            yield Listed(name, info.size, info.mtime_ns or 0)


def _unreadable(root: str, error: OSError) -> Exception:
    reason = " ".join(str(error).split())
    if "NO_SUCH_BUCKET" in reason:
        return NotFound("data.root", "names a bucket that does not exist", value=root)
    if any(word in reason.upper() for word in _REFUSED):
        return UserError(
            "data.root",
            f"is refused by its server ({reason[:200]})",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to keys that may read it, and "
            "AWS_ENDPOINT_URL to the server if it is not Amazon's",
            value=root,
        )
    return OSError(f"data.root {root!r} cannot be read: {reason[:300]}")


def source_fingerprint(data: DataConfig) -> str:
    """Digest of the names, sizes and dates of the source's files: it changes when the images may have changed."""
    digest = hashlib.sha256()
    for file in _files_of(data):
        digest.update(f"{file.path}\0{file.size}\0{file.changed}\n".encode())
    return digest.hexdigest()[:16]


def _files_of(data: DataConfig) -> list[Listed]:
    if data.root is None:
        return []
    try:
        return list_files(storage.absolute(data.root))
    except FileNotFoundError:
        return []  # opening the source says so
