"""Requests that concern one object in S3 as a whole: read it, or write it if there is none.

Arrow asks for an object's length first and then for that many bytes, so that one which is replaced in between comes
back cut or padded with zeros. Here each is one request, which S3 answers with one version of the object.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ncsn.patience import patiently

SCHEME = "s3://"

_TRIES_IN_CONFLICT = 5
_CONNECT_SECONDS, _ANSWER_SECONDS = 5, 30

T = TypeVar("T")


def get(uri: str) -> bytes:
    """The object as it was at one moment, whoever replaces it meanwhile.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if it cannot be read.
    """
    bucket, key = _place(uri)
    return _request(uri, lambda: bytes(client().get_object(Bucket=bucket, Key=key)["Body"].read()))


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write an object unless there is one; whether this call wrote it.

    Raises:
        OSError: if it cannot be written.
    """
    bucket, key = _place(uri)
    put = partial(client().put_object, Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    for tries_left in reversed(range(_TRIES_IN_CONFLICT)):
        try:
            _request(uri, put)
        except FileExistsError:
            return False
        except BlockingIOError:
            if not tries_left:
                raise
        else:
            break
    return True


@functools.cache
def client() -> Any:
    """boto3's client, which threads share; the environment says where the store is and with which keys."""
    import boto3
    from botocore.config import Config

    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells of the keys that it found, in every worker's log

    # Tries are counted by `patiently`. A session of its own: boto3's shared one must not make clients in two threads
    # at once.
    once = Config(retries={"total_max_attempts": 1}, connect_timeout=_CONNECT_SECONDS, read_timeout=_ANSWER_SECONDS)
    return boto3.session.Session().client("s3", region_name=os.environ.get("AWS_REGION"), config=once)


def _place(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    return bucket, key


def _request(uri: str, call: Callable[[], T]) -> T:
    """The answer, waited for while the store is away; what boto3 raises becomes Python's own error."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return patiently(call)
    except ClientError as error:
        kind = {
            "NoSuchKey": FileNotFoundError,
            "NoSuchBucket": FileNotFoundError,
            "PreconditionFailed": FileExistsError,
            # Two writers at the same moment: S3 may refuse both, and wants to be asked again.
            "ConditionalRequestConflict": BlockingIOError,
        }.get(error.response["Error"]["Code"], OSError)
        raise kind(f"{uri}: {error}") from error
    except BotoCoreError as error:
        raise OSError(f"{uri}: {error}") from error
