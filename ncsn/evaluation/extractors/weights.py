"""Published weights of extractors, from a path, a URL or a bucket."""

from __future__ import annotations

import hashlib
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from ncsn import storage
from ncsn.errors import NotFound, UserError
from ncsn.storage.files import cache_folder

TIMEOUT_SECONDS = 60


def obtain_weights(source: str, *, sha256: str) -> Path:
    """A local file with the weights at `source`: a local path, an http(s) URL or an s3 URI."""
    if not source.startswith(("http://", "https://", storage.S3_SCHEME)):
        path = Path(storage.absolute(source))
        if not path.is_file():
            raise NotFound("evaluation.weights", "no file here", value=str(path))
        _check(path, source, sha256)
        return path
    cached = cache_folder() / "weights" / sha256
    if not cached.is_file():
        with storage.local_file(cached) as temporary:
            with _open(source) as stream, temporary.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
            _check(temporary, source, sha256)
    return cached


def _open(source: str) -> BinaryIO:
    try:
        if source.startswith(storage.S3_SCHEME):
            filesystem, path = storage.filesystem(source)
            return cast("BinaryIO", filesystem.open_input_stream(path))
        # Scheme and source come from the config, which the user of this machine wrote.
        return cast("BinaryIO", urllib.request.urlopen(source, timeout=TIMEOUT_SECONDS))  # noqa: S310
    except FileNotFoundError:
        raise NotFound("evaluation.weights", "no file here", value=source) from None
    except (urllib.error.URLError, pa.ArrowException) as error:
        raise OSError(f"evaluation.weights: cannot read {source}: {error}") from None
    except ValueError as error:
        raise UserError("evaluation.weights", f"not an address: {error}", value=source) from None


def _check(path: Path, source: str, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        reason = f"has SHA-256 {found}, expected {sha256}"
        raise UserError("evaluation.weights", reason, hint="get the published file", value=source)
