"""One retry policy for servers that are unavailable for a while."""

from __future__ import annotations

import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from ncsn.errors import UserError

STORE_VARIABLE = "NCSN_STORE_PATIENCE"  # seconds for which a call to the store is repeated
STORE_SECONDS = 180.0  # an outage of two minutes, and the time until the server is ready again
S3_SCHEME = "s3://"  # of the address of a store that is not on a disk
RETRY = "retry: "  # how a message about work that starts again begins, which the terminal shows beside the log

T = TypeVar("T")

# Without importing the libraries: their names for a server that was not reached or broke off.
_UNREACHED = {
    "botocore.exceptions": {"ConnectionError", "HTTPClientError", "IncompleteReadError"},
    "requests.exceptions": {"ConnectionError", "Timeout", "ChunkedEncodingError"},
    "urllib3.exceptions": {"MaxRetryError", "NewConnectionError", "ProtocolError", "TimeoutError"},
}
# ConditionalRequestConflict: of two writers at the same moment S3 may refuse both.
_BUSY_CODES = {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "ConditionalRequestConflict"}
_BUSY_STATUS = 429
_ARROWS_WORDS = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIME|HTTP status 5\d\d"
)

_limit: ContextVar[float] = ContextVar("limit", default=math.inf)
_logger = logging.getLogger(__name__)


def unavailable(error: Exception) -> str | None:
    """Why a server cannot answer for now, in a line; None if the same call would fail again.

    Knows the errors of boto3, Arrow, requests, urllib3, and of clients that put an HTTP status into `error.status`.
    """
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # boto3's
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        away = response.get("Error", {}).get("Code") in _BUSY_CODES
    else:
        status = getattr(response, "status_code", None) or getattr(error, "status", None) or 0
        away = isinstance(error, (ConnectionError, TimeoutError)) or any(
            kind.__name__ in _UNREACHED.get(kind.__module__, ()) for kind in type(error).__mro__
        )
        away = away or (isinstance(error, OSError) and bool(_ARROWS_WORDS.search(str(error))))
    away = away or (isinstance(status, int) and (status >= 500 or status == _BUSY_STATUS))
    return (str(error).partition("\n")[0] or type(error).__name__) if away else None


@dataclass(frozen=True)
class Retry:
    """Calls again, with growing pauses, while a server is unavailable; the last error is raised."""

    server: str
    seconds: float  # after which it gives up; with 0 there is one call
    pauses: tuple[float, float] = (0.5, 5.0)  # seconds: the first and the longest
    say: Callable[[str], None] = _logger.warning

    def __call__(self, call: Callable[[], T]) -> T:
        """The result of `call`; says once that it waits, and once that the server answers again."""
        started, waits, (pause, longest) = time.monotonic(), False, self.pauses
        while True:
            try:
                result = call()
            except Exception as error:
                reason = unavailable(error)
                if reason is None or time.monotonic() + pause - started > self.seconds:
                    raise
                if not waits:
                    self.say(f"{RETRY}{self.server} is unavailable ({reason}); trying again for {self.seconds:g} s")
                waits = True
            else:
                if waits:
                    self.say(f"{self.server} answers again after {time.monotonic() - started:.1f} s")
                return result
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - so that many workers do not call at once
            pause = min(2 * pause, longest)


def call_store(call: Callable[[], T]) -> T:
    """The result of a call to the store in S3, repeated while it is unavailable."""
    given = os.environ.get(STORE_VARIABLE)
    try:
        seconds = float(given or STORE_SECONDS)
    except ValueError:
        raise UserError(STORE_VARIABLE, "not a number of seconds", value=given) from None
    return Retry("the store", min(seconds, _limit.get()))(call)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """In this block, a call to the store is repeated for at most `seconds`."""
    token = _limit.set(seconds)
    try:
        yield
    finally:
        _limit.reset(token)
