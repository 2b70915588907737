"""One retry policy for servers that are unavailable for a while, and the simulated outages of `--inject`."""

from __future__ import annotations

import json
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
from pathlib import Path
from typing import Literal, TypeVar

from ncsn.errors import UserError

OUTAGE_VARIABLE = "NCSN_OUTAGES"  # names the folder of the declared outages; a run with `--inject` sets it
STORE_VARIABLE = "NCSN_STORE_PATIENCE"  # seconds for which a call to the store is repeated
STORE_SECONDS = 120.0

Server = Literal["store", "tracking"]
T = TypeVar("T")

_TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIME|HTTP status 5\d\d"
)
# ConditionalRequestConflict: of two writers at the same moment S3 may refuse both.
_TRANSIENT_CODES = {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "ConditionalRequestConflict"}
_TRANSIENT_KINDS = {"ConnectionError", "HTTPClientError", "IncompleteReadError"}

_limit: ContextVar[float] = ContextVar("limit", default=math.inf)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retry:
    """Calls again, with growing pauses, while a server is unavailable; the last error is raised."""

    server: str
    seconds: float  # after which it gives up; with 0 there is one call
    reason: Callable[[Exception], str | None]  # why the server is unavailable; None if another call would fail too
    pauses: tuple[float, float] = (0.5, 10.0)  # seconds: the first and the longest
    say: Callable[[str], None] = _logger.warning

    def __call__(self, call: Callable[[], T]) -> T:
        """The result of `call`; says once that it waits, and once that the server answers again."""
        started, waits, (pause, longest) = time.monotonic(), False, self.pauses
        while True:
            try:
                result = call()
            except Exception as error:
                reason = self.reason(error)
                if reason is None or time.monotonic() + pause - started > self.seconds:
                    raise
                if not waits:
                    self.say(f"{self.server} is unavailable ({reason}); trying again for {self.seconds:g} s")
                waits = True
            else:
                if waits:
                    self.say(f"{self.server} answers again after {time.monotonic() - started:.1f} s")
                return result
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - so that many workers do not call at once
            pause = min(2 * pause, longest)


def call_store(call: Callable[[], T]) -> T:
    """The result of a call to the store in S3, repeated while it is unavailable."""

    def attempt() -> T:
        simulate_outage("store")
        return call()

    return Retry("the store", min(_store_seconds(), _limit.get()), _reason, pauses=(0.2, 5.0))(attempt)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """In this block, a call to the store is repeated for at most `seconds`."""
    token = _limit.set(seconds)
    try:
        yield
    finally:
        _limit.reset(token)


def start_outage(server: Server, *, seconds: float, share: float = 1.0) -> None:
    """Let a `share` of the calls to `server` fail for `seconds` from now on."""
    path = Path(os.environ[OUTAGE_VARIABLE]) / server
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{server}.{os.getpid()}")
    temporary.write_text(json.dumps({"until": time.time() + seconds, "share": share}))
    temporary.replace(path)


def outage_environment() -> dict[str, str]:
    """The variable of the outages, for processes that do not inherit this process's environment."""
    return {OUTAGE_VARIABLE: os.environ[OUTAGE_VARIABLE]} if OUTAGE_VARIABLE in os.environ else {}


def simulate_outage(server: Server) -> None:
    """Raise ConnectionRefusedError during a declared outage of `server`."""
    folder = os.environ.get(OUTAGE_VARIABLE)
    if folder is None:
        return
    try:
        outage = json.loads((Path(folder) / server).read_text())
    except FileNotFoundError:
        return
    left = outage["until"] - time.time()
    if left > 0 and random.random() < outage["share"]:  # noqa: S311 - no secret depends on it
        raise ConnectionRefusedError(f"simulated outage of the {server} server, for {left:.0f} s more")


def _store_seconds() -> float:
    given = os.environ.get(STORE_VARIABLE)
    try:
        return float(given or STORE_SECONDS)
    except ValueError:
        raise UserError(STORE_VARIABLE, "not a number of seconds", value=given) from None


def _reason(error: Exception) -> str | None:
    return str(error).partition("\n")[0] if _is_transient(error) else None


def _is_transient(error: Exception) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    response = getattr(error, "response", None)  # boto3's, which is not imported for this
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or response.get("Error", {}).get("Code") in _TRANSIENT_CODES
    kinds = {kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "botocore.exceptions"}
    return bool(kinds & _TRANSIENT_KINDS) or (isinstance(error, OSError) and bool(_TRANSIENT.search(str(error))))
