"""A store in S3 that may be away for a while: each call is repeated, with growing pauses, before it counts as failed.

Everything that speaks to S3 comes through here, also Ray Train's own uploads, which get the file system from
`ncsn.storage`. A file is written when it is complete, from a local copy, so that a failed upload starts again at its
first byte; a reader opens the file again where it was.
"""

from __future__ import annotations

import io
import logging
import math
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from ncsn import outages
from ncsn.errors import UserError

VARIABLE = "NCSN_STORE_PATIENCE"
"""Seconds for which a call is repeated, in the environment."""
PATIENCE_SECONDS = 120.0
"""The same where it says nothing."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two tries."""
IN_MEMORY = 8 << 20
"""Bytes of a file that is being written; what is longer waits on the local disk."""

_TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIME|HTTP status 5\d\d"
)
_TRANSIENT_CODES = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout"})
_TRANSIENT_KINDS = frozenset({"ConnectionError", "HTTPClientError", "IncompleteReadError"})

T = TypeVar("T")
_limit: ContextVar[float] = ContextVar("limit", default=math.inf)
_logger = logging.getLogger(__name__)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Repeat the calls of this block for no longer: they are a first look, or nobody should wait for them."""
    token = _limit.set(seconds)
    try:
        yield
    finally:
        _limit.reset(token)


def patiently(call: Callable[[], T]) -> T:
    """The result of `call`, repeated for two minutes or what the variable says while the store is away.

    A warning says so, once.

    Raises:
        UserError: if the variable holds no number.
        OSError: or what else the call raises, if it keeps failing, or fails for a reason that waiting does not mend.
    """
    patience = min(_patience(), _limit.get())
    started, pause, tries = time.monotonic(), FIRST_PAUSE, 0
    while True:
        try:
            outages.refuse("store")
            result = call()
        except Exception as error:
            tries += 1
            if not _is_transient(error) or time.monotonic() + pause - started > patience:
                raise
            if tries == 1:
                reason = str(error).partition("\n")[0]
                _logger.warning("the store is away, trying again for %d s: %s", patience, reason)
        else:
            if tries:
                _logger.warning("the store answers again after %.1f s", time.monotonic() - started)
            return result
        time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - so that many workers do not knock in step
        pause = min(2 * pause, LONGEST_PAUSE)


def _patience() -> float:
    given = os.environ.get(VARIABLE)
    try:
        return float(given or PATIENCE_SECONDS)
    except ValueError:
        raise UserError(VARIABLE, "not a number of seconds", value=given) from None


def s3_filesystem(bucket: str) -> fs.FileSystem:
    """The patient file system of a bucket; the environment says where it is."""
    # from_uri honours AWS_ENDPOINT_URL and finds a bucket's region; only the constructor can turn off writes in the
    # background, for which Arrow takes the same few threads that wait for them when several files are copied.
    found = patiently(partial(fs.FileSystem.from_uri, f"s3://{bucket}"))[0]
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    where = {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme} if endpoint.netloc else {}
    return fs.PyFileSystem(_Patient(fs.S3FileSystem(region=found.region, background_writes=False, **where)))


def _is_transient(error: Exception) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    response = getattr(error, "response", None)  # boto3's, which is not imported for this
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or response.get("Error", {}).get("Code") in _TRANSIENT_CODES
    if any(
        kind.__module__ == "botocore.exceptions" and kind.__name__ in _TRANSIENT_KINDS for kind in type(error).__mro__
    ):
        return True
    return isinstance(error, OSError) and _TRANSIENT.search(str(error)) is not None


class _Patient(fs.FileSystemHandler):  # type: ignore[misc]
    """Arrow's S3 file system, call by call."""

    def __init__(self, filesystem: fs.FileSystem) -> None:
        self._fs = filesystem

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Patient) and self._fs == other._fs

    def get_type_name(self) -> str:
        return str(self._fs.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self._fs.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return patiently(partial(self._fs.get_file_info, paths))

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return patiently(partial(self._fs.get_file_info, selector))

    def create_dir(self, path: str, recursive: bool) -> None:  # noqa: FBT001 - Arrow's order
        patiently(partial(self._fs.create_dir, path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        patiently(partial(self._fs.delete_dir, path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:  # noqa: FBT001, FBT002
        patiently(partial(self._fs.delete_dir_contents, path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("nobody empties a whole store")

    def delete_file(self, path: str) -> None:
        patiently(partial(self._fs.delete_file, path))

    def move(self, src: str, dest: str) -> None:
        patiently(partial(self._fs.move, src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        patiently(partial(self._fs.copy_file, src, dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_Reader(partial(self._fs.open_input_file, path)), mode="r")

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> pa.NativeFile:
        return pa.PythonFile(_Writer(partial(self._fs.open_output_stream, path, metadata=metadata or None)), mode="w")

    def open_append_stream(self, path: str, metadata: dict[str, str]) -> pa.NativeFile:
        raise NotImplementedError("S3 cannot append")


class _Reader(io.RawIOBase):
    def __init__(self, open_file: Callable[[], pa.NativeFile]) -> None:
        self._open, self._position = open_file, 0
        file = patiently(open_file)
        self._size = int(file.size())
        self._file: pa.NativeFile | None = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        data = patiently(partial(self._read, size))
        self._position += len(data)
        return data

    def _read(self, size: int) -> bytes:
        file, self._file = self._file, None
        if file is None:
            file = self._open()
        file.seek(self._position)
        data: bytes = file.read(size if size >= 0 else None)
        self._file = file  # kept only if it is well
        return data


class _Writer(io.RawIOBase):
    def __init__(self, open_file: Callable[[], pa.NativeFile]) -> None:
        self._open = open_file
        self._spool = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, prefix="ncsn-")  # noqa: SIM115 - until close

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._spool.write(data)

    def close(self) -> None:
        if self.closed:
            return
        try:
            patiently(self._upload)
        finally:
            self._spool.close()
            super().close()

    def _upload(self) -> None:
        self._spool.seek(0)
        with self._open() as stream:
            shutil.copyfileobj(self._spool, stream, 1 << 20)
