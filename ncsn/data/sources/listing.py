"""The files of a source: where they are, their names, sizes and dates. Loads no torch."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pyarrow import fs

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.errors import NotFound, UserError
from ncsn.storage.retry import unavailable

DOWNLOADED = ("fashion_mnist", "mnist", "cifar10")  # what data.download fetches


def required_root(data: DataConfig) -> str:
    """data.root of a source that reads files."""
    if data.root is None:
        download = "; data.download=true downloads them into it" if data.source in DOWNLOADED else ""
        raise UserError(
            "data.root",
            f"is not set, and data.source {data.source} reads files",
            hint=f"set it to the folder with the files of {data.source}{download}",
        )
    return data.root


def root_of(data: DataConfig) -> Path:
    root = Path(required_root(data)).expanduser()
    if not root.exists():
        raise _missing(data.root)
    return root


def require_utf8(name: str, *, key: str) -> None:
    """Refuse the name of a file that is not text: it can neither be hashed nor shown."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(key, f"holds {name!r}, a name that is not UTF-8", hint="rename it") from None


class Listed(NamedTuple):
    """A file: its path below the root, its bytes, and when it changed in nanoseconds."""

    path: str
    size: int
    changed: int


def list_files(root: str) -> list[Listed]:
    """All files below `root` but hidden ones, sorted by path; `root` itself, by its name, if it is a file."""
    return sorted(_local_files(Path(root)) if storage.is_local(root) else _objects(root))


def source_fingerprint(data: DataConfig) -> str:
    """Digest of the names, sizes and dates of the source's files: it changes when the images may have changed."""
    try:
        files = [] if data.root is None else list_files(storage.absolute(data.root))
    except FileNotFoundError:
        files = []  # opening the source says so
    lines = (f"{file.path}\0{file.size}\0{file.changed}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _local_files(root: Path) -> Iterator[Listed]:
    if not root.exists():
        raise _missing(root)
    if root.is_file():
        yield Listed(root.name, root.stat().st_size, root.stat().st_mtime_ns)
    else:
        status = root.stat()
        yield from _files_below(str(root), "", above=frozenset({(status.st_dev, status.st_ino)}))


def _files_below(folder: str, prefix: str, *, above: frozenset[tuple[int, int]]) -> Iterator[Listed]:
    """The files of `folder` and of its folders, `prefix` before each name.

    A link to a folder that it is in, one of `above`, is not followed.
    """
    folders = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "lost+found":  # the latter is root's on each ext4 volume
                    continue
                try:
                    status = entry.stat()
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ELOOP):  # deleted meanwhile, or a link to nothing or itself
                        continue
                    raise
                identity = status.st_dev, status.st_ino
                if stat.S_ISREG(status.st_mode):
                    require_utf8(prefix + entry.name, key="data.root")
                    yield Listed(prefix + entry.name, status.st_size, status.st_mtime_ns)
                elif stat.S_ISDIR(status.st_mode) and identity not in above:
                    folders.append((entry, above | {identity}))
    except OSError as error:
        reason, hint = f"cannot be read: {error.strerror}", "make it readable, or remove it"
        raise UserError("data.root", reason, hint=hint, value=folder) from error
    for entry, above_it in folders:
        yield from _files_below(entry.path, f"{prefix}{entry.name}/", above=above_it)


def _objects(root: str) -> Iterator[Listed]:
    try:
        filesystem, path = storage.filesystem(root)
        (info,) = filesystem.get_file_info([path])
        alone = info.type == fs.FileType.File
        infos = [info] if alone else filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    except FileNotFoundError:
        raise _missing(root) from None
    except OSError as error:
        if unavailable(error):
            raise
        hint = "set AWS_ENDPOINT_URL, and AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to keys that may read it"
        raise UserError("data.root", f"cannot be read: {' '.join(str(error).split())}", hint=hint, value=root) from None
    for info in infos:
        name = info.base_name if alone else info.path.removeprefix(f"{path}/")
        hidden = any(part.startswith(".") for part in name.split("/"))
        if info.type == fs.FileType.File and not hidden:
            yield Listed(name, info.size, info.mtime_ns or 0)


def _missing(root: object) -> NotFound:
    return NotFound("data.root", "does not exist", hint="set it to where the images are", value=str(root))
