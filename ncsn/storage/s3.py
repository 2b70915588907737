"""Arrow's S3 file system whose calls are repeated, and requests for one whole object."""

from __future__ import annotations

import functools
import io
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from ncsn.errors import NotFound, UserError
from ncsn.storage.retry import S3_SCHEME, call_store

IN_MEMORY = 8 << 20  # bytes of a file that is being written; a longer one is spooled to the local disk
PART = 8 << 20  # bytes of a part of an upload; S3 takes 10,000 parts
_CONNECT_SECONDS, _ANSWER_SECONDS = 5, 30
_AN_ADDRESS = "use one such as http://HOST:PORT"

T = TypeVar("T")


@functools.cache
def bucket_filesystem(bucket: str) -> fs.FileSystem:
    return fs.PyFileSystem(_Retrying(bucket))


# Arrow's own retries know no limit in seconds, and warn of nothing. Its own search for keys knows no other STS than
# AWS's, so it gets those of boto3, which renews the ones that end.
class _Retrying(fs.FileSystemHandler):  # type: ignore[misc]
    def __init__(self, bucket: str) -> None:
        # from_uri honors AWS_ENDPOINT_URL and finds a bucket's region.
        _require_address()
        self._bucket = bucket
        try:
            self._found = call_store(partial(fs.FileSystem.from_uri, f"{S3_SCHEME}{bucket}"))[0]
        except pa.ArrowInvalid as error:
            place, hint = f"{S3_SCHEME}{bucket}", "use s3://bucket/prefix"
            raise UserError(place, f"names no bucket: {error}", hint=hint) from None
        self._credentials = _session().get_credentials()

    def __reduce__(self) -> Any:
        return _Retrying, (self._bucket,)

    @property
    def _fs(self) -> fs.FileSystem:
        if self._credentials is None:
            return self._found
        keys = _request(f"{S3_SCHEME}{self._bucket}", self._credentials.get_frozen_credentials)
        address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return _with_keys(address, self._found.region, keys.access_key, keys.secret_key, keys.token)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Retrying) and self._bucket == other._bucket

    def get_type_name(self) -> str:
        return str(self._fs.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self._fs.normalize_path(path))

    def get_file_info(self, paths: list[str] | fs.FileSelector) -> list[fs.FileInfo]:
        return call_store(partial(self._fs.get_file_info, paths))

    get_file_info_selector = get_file_info

    def create_dir(self, path: str, recursive: bool) -> None:  # noqa: FBT001 - Arrow's order
        call_store(partial(self._fs.create_dir, path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        call_store(partial(self._fs.delete_dir, path))

    def delete_file(self, path: str) -> None:
        call_store(partial(self._fs.delete_file, path))

    def copy_file(self, src: str, dest: str) -> None:
        call_store(partial(self._fs.copy_file, src, dest))

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_Reader(lambda: self._fs.open_input_file(path)), mode="r")

    open_input_stream = open_input_file

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> pa.NativeFile:  # noqa: ARG002 - Arrow's
        return pa.PythonFile(_Writer(f"{S3_SCHEME}{path}"), mode="w")

    def _unused(self, *_: object, **__: object) -> Any:
        raise NotImplementedError("neither this project nor Ray Tune asks for it")

    delete_dir_contents = delete_root_dir_contents = move = open_append_stream = _unused


# After an error the file is opened again at the same place.
class _Reader(io.RawIOBase):
    def __init__(self, open_file: Callable[[], pa.NativeFile]) -> None:
        self._open, self._position = open_file, 0
        file = call_store(open_file)
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
        data = call_store(partial(self._read, size))
        self._position += len(data)
        return data

    def _read(self, size: int) -> bytes:
        file, self._file = self._file, None
        if file is None:
            file = self._open()
        file.seek(self._position)
        data: bytes = file.read(size if size >= 0 else None)
        self._file = file  # kept only if it could be read
        return data


# The upload begins when the file is complete, so that one that fails can start again at the first byte. Arrow's own
# stream completes an upload also after an error, which publishes a part of the file.
class _Writer(io.RawIOBase):
    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._spool = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, prefix="ncsn-")  # noqa: SIM115 - until close

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._spool.write(data)

    def close(self) -> None:
        if self.closed:
            return
        try:
            put(self._uri, self._spool)
        finally:
            self._spool.close()
            super().close()

    def __del__(self) -> None:
        self._spool.close()  # and no upload, as the base class would: what is not closed is not complete


def put(uri: str, file: IO[bytes]) -> None:
    """Write the whole file, of any size, as one object, in place of an older one."""
    _request(uri, partial(_upload, uri, file))


def _upload(uri: str, file: IO[bytes]) -> None:
    # After an error there is no object.
    bucket, key = _place(uri)
    file.seek(0)
    data = file.read(PART)
    if len(data) < PART:
        client().put_object(Bucket=bucket, Key=key, Body=data)
        return
    answer = client().create_multipart_upload(Bucket=bucket, Key=key)
    upload, tags = {"Bucket": bucket, "Key": key, "UploadId": answer["UploadId"]}, list[str]()
    try:
        while data:
            tags.append(client().upload_part(**upload, PartNumber=len(tags) + 1, Body=data)["ETag"])
            data = file.read(PART)
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        client().complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    except BaseException:
        with suppress(Exception):
            client().abort_multipart_upload(**upload)
        raise


def get(uri: str, check: Callable[[int], object]) -> bytes:
    """One version of the object, whole, after `check` of its size; FileNotFoundError if there is none."""
    # Arrow asks for an object's length first and then for that many bytes, so that an object which is replaced in
    # between comes back cut or padded with zeros.
    bucket, key = _place(uri)

    def read() -> bytes:
        answer = client().get_object(Bucket=bucket, Key=key)
        with closing(answer["Body"]) as body:
            check(answer["ContentLength"])
            return bytes(body.read())

    return _request(uri, read)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write an object unless there is one; whether this call wrote it."""
    bucket, key = _place(uri)
    try:
        _request(uri, lambda: client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*"))
    except FileExistsError:
        return False
    return True


def _session() -> Any:
    import boto3

    logging.getLogger("botocore").setLevel(logging.WARNING)  # else every worker's log says where it found the keys
    # New, since threads must not make clients of the shared one at once.
    return boto3.session.Session(region_name=os.environ.get("AWS_REGION"))


@functools.lru_cache(maxsize=4)
def _with_keys(address: str | None, region: str, key: str, secret: str, token: str | None) -> fs.FileSystem:
    keys = {"access_key": key, "secret_key": secret, "session_token": token}
    return fs.S3FileSystem(**keys, region=region, endpoint_override=address)


@functools.cache
def client() -> Any:
    """boto3's client, which threads share; address and keys come from the environment."""
    from botocore.config import Config
    from botocore.exceptions import InvalidRegionError

    once = Config(
        retries={"total_max_attempts": 1},  # `call_store` repeats calls
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_ANSWER_SECONDS,
        request_checksum_calculation="when_required",  # some servers refuse parts with one that the upload did not name
    )
    _require_address()  # so that both clients refuse the same ones
    try:
        return _session().client("s3", config=once)
    except InvalidRegionError:
        given = os.environ.get("AWS_REGION")
        raise UserError("AWS_REGION", "not a region", hint="use one such as us-east-1", value=given) from None
    except ValueError as error:
        raise UserError("AWS_ENDPOINT_URL", f"cannot be used: {error}", hint=_AN_ADDRESS) from None


def _require_address() -> None:
    """Refuse an address of a server in the environment that is none."""
    variable = "AWS_ENDPOINT_URL_S3" if os.environ.get("AWS_ENDPOINT_URL_S3") else "AWS_ENDPOINT_URL"
    given = os.environ.get(variable)
    try:
        parts = urlsplit(given or "http://amazon")
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise UserError(variable, "not an address", hint=_AN_ADDRESS, value=given)


def _place(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3_SCHEME).partition("/")
    return bucket, key


def _request(uri: str, call: Callable[[], T]) -> T:
    """The answer of `call`, with Python's own errors in place of boto3's."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return call_store(call)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "NoSuchBucket":
            raise NotFound(uri, "is in a bucket that does not exist", hint="create the bucket") from error
        kind = {"NoSuchKey": FileNotFoundError, "PreconditionFailed": FileExistsError}.get(code, OSError)
        raise kind(f"{uri}: {error}") from error
    except BotoCoreError as error:
        raise OSError(f"{uri}: {error}") from error
