"""The files of a source: where they are, their names, sizes and dates. Loads no torch."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pyarrow import fs

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.errors import NotFound, UserError

DOWNLOADED = ("fashion_mnist", "mnist", "cifar10")  # what data.download fetches
_REFUSED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE", "CREDENTIALS", "FORBIDDEN")


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
    """The existing local file or folder that holds the source."""
    root = Path(required_root(data)).expanduser()
    if not root.exists():
        raise _missing(data.root)
    return root


def safe_member(name: str, *, archive: Path | str) -> PurePosixPath:
    """The path of an archive's member, which must not be absolute or hold `..`.

    Nothing is unpacked here, but an archive with such a name was made to do harm, so none of it is trusted.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts[:1] and path.parts[0].endswith(":")):
        raise UserError(str(archive), f"is refused: its member {name!r} points outside of it")
    return path


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


def first_file(root: str, suffixes: tuple[str, ...]) -> str | None:
    """The path of one of the files of `list_files` with such an ending, without listing all; None if there is none."""
    files = _local_files(Path(root)) if storage.is_local(root) else _objects(root, at_once=False)
    return next((file.path for file in files if file.path.lower().endswith(suffixes)), None)


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
        yield _listed(root.name, root.stat())
    else:
        yield from _files_below(str(root), "", above=())


def _files_below(folder: str, prefix: str, *, above: tuple[tuple[int, int], ...]) -> Iterator[Listed]:
    """The files of `folder` and of its folders, `prefix` before each name.

    A link to a folder that it is in, one of `above`, is not followed.
    """
    folders = []
    try:
        above = (*above, _identity(Path(folder).stat()))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "lost+found":  # the latter is root's on each ext4 volume
                    continue
                status = _status(entry)
                if status is not None and stat.S_ISREG(status.st_mode):
                    yield _listed(prefix + entry.name, status)
                elif status is not None and stat.S_ISDIR(status.st_mode) and _identity(status) not in above:
                    folders.append(entry)
    except OSError as error:
        raise UserError(
            "data.root", f"cannot be read: {error.strerror}", hint="make it readable, or remove it", value=folder
        ) from error
    for entry in folders:
        yield from _files_below(entry.path, f"{prefix}{entry.name}/", above=above)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Status of what an entry of a folder links to; None if it is deleted meanwhile, or links to nothing or itself."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def _listed(name: str, status: os.stat_result) -> Listed:
    require_utf8(name, key="data.root")
    return Listed(name, status.st_size, status.st_mtime_ns)


def _objects(root: str, *, at_once: bool = True) -> Iterator[Listed]:
    """The objects, asked for at once, which takes the fewest requests, or folder by folder."""
    with _told(root):
        filesystem, path = storage.filesystem(root)
        (info,) = filesystem.get_file_info([path])
    if info.type == fs.FileType.File:
        yield Listed(info.base_name, info.size, info.mtime_ns or 0)
        return
    folders = [path]
    while folders:
        with _told(root):
            infos = filesystem.get_file_info(fs.FileSelector(folders.pop(), recursive=at_once))
        for info in infos:
            name = info.path.removeprefix(f"{path}/")
            if any(part.startswith(".") for part in name.split("/")):
                continue
            if info.type == fs.FileType.File:
                yield Listed(name, info.size, info.mtime_ns or 0)
            elif not at_once:
                folders.append(info.path)


@contextmanager
def _told(root: str) -> Iterator[None]:
    """Say in the words of data.root what a bucket answers."""
    try:
        yield
    except FileNotFoundError:
        raise _missing(root) from None
    except OSError as error:
        raise _unreadable(root, error) from error


def _missing(root: object) -> NotFound:
    return NotFound("data.root", "does not exist", hint="set it to where the images are", value=str(root))


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
