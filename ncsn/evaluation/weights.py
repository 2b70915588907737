"""Weights of a fixed extractor: from where the config says, checked by SHA-256, kept on this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from ncsn import storage
from ncsn.data.training_images import CACHE_DIR_VARIABLE, DEFAULT_CACHE_DIR
from ncsn.errors import NotFound, UserError

TIMEOUT_SECONDS = 60


def obtain_weights(source: str, *, sha256: str) -> Path:
    """A local file with the weights. Nothing is fetched but from the source that the user named.

    Args:
        source: local path, http(s) URL or s3 URI.
        sha256: the file's SHA-256, 64 lower-case hex digits.

    Raises:
        NotFound: if there is no file at `source`.
        UserError: if its SHA-256 is another one; the file is not kept.
        OSError: if the source cannot be reached.
    """
    remote = source.startswith(("http://", "https://", storage.S3_SCHEME))
    if not remote:
        path = Path(storage.absolute(source))
        if not path.is_file():
            raise NotFound("evaluation.weights", "no file here", value=str(path))
        _check(path, source, sha256)
        return path
    cached = Path(os.environ.get(CACHE_DIR_VARIABLE) or DEFAULT_CACHE_DIR).expanduser() / "weights" / sha256
    if not cached.is_file():
        _fetch(source, cached, sha256)
    return cached


def _fetch(source: str, cached: Path, sha256: str) -> None:
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_name(f".{cached.name[:16]}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with _open(source) as stream, temporary.open("wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        _check(temporary, source, sha256)
        os.replace(temporary, cached)
    finally:
        temporary.unlink(missing_ok=True)


def _open(source: str) -> BinaryIO:
    if source.startswith(storage.S3_SCHEME):
        filesystem, path = storage.filesystem(source)
        try:
            return cast("BinaryIO", filesystem.open_input_stream(path))
        except FileNotFoundError:
            raise NotFound("evaluation.weights", "no file here", value=source) from None
        except pa.ArrowException as error:
            raise OSError(f"evaluation.weights: cannot read {source}: {error}") from None
    try:
        # Scheme and source come from the config of the user whose machine this is.
        return cast("BinaryIO", urllib.request.urlopen(source, timeout=TIMEOUT_SECONDS))  # noqa: S310
    except urllib.error.URLError as error:
        raise OSError(f"evaluation.weights: cannot fetch {source}: {error.reason}") from None


def _check(path: Path, source: str, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(
            "evaluation.weights",
            f"has SHA-256 {found}, expected {sha256}",
            hint="get the right file, or set evaluation.weights_sha256 if this one is meant",
            value=source,
        )
