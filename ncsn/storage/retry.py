"""A store in S3 that may be away for a while: each call is repeated, with growing pauses, before it counts as failed.

A fault (`ncsn.faults`) declares an outage; the one place that speaks to the server asks `refuse` before each call.
Without the variable that costs one look into the environment.

Everything that speaks to S3 comes through here, also Ray Train's own uploads, which get the file system from
`ncsn.storage`. A file is written when it is complete, from a local copy, so that a failed upload starts again at its
first byte; a reader opens the file again where it was.
"""

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
from pathlib import Path
from typing import Literal, TypeVar

from ncsn.errors import UserError

OUTAGE_VARIABLE = "NCSN_OUTAGES"
"""Names the folder of the declared outages; set by a rehearsal for what it starts."""

Server = Literal["store", "tracking"]


def declare(server: Server, *, seconds: float, share: float = 1.0) -> None:
    """Take `server` away from now on for `seconds`; `share` is the part of the calls that fail."""
    path = Path(os.environ[OUTAGE_VARIABLE]) / server
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{server}.{os.getpid()}")
    temporary.write_text(json.dumps({"until": time.time() + seconds, "share": share}))
    temporary.replace(path)


def inherited() -> dict[str, str]:
    """The variable, for processes that do not inherit the environment of this one."""
    return {OUTAGE_VARIABLE: os.environ[OUTAGE_VARIABLE]} if OUTAGE_VARIABLE in os.environ else {}


def refuse(server: Server) -> None:
    """Return, unless a rehearsal has taken the server away.

    Raises:
        ConnectionRefusedError: if it has.
    """
    folder = os.environ.get(OUTAGE_VARIABLE)
    if folder is None:
        return
    try:
        outage = json.loads((Path(folder) / server).read_text())
    except FileNotFoundError:
        return
    left = outage["until"] - time.time()
    if left > 0 and random.random() < outage["share"]:  # noqa: S311 - no secret depends on it
        raise ConnectionRefusedError(f"rehearsal: the {server} server is away for {left:.0f} s more")


PATIENCE_VARIABLE = "NCSN_STORE_PATIENCE"
"""Seconds for which a call is repeated, in the environment."""
PATIENCE_SECONDS = 120.0
"""The same where it says nothing."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two tries."""

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
            refuse("store")
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
    given = os.environ.get(PATIENCE_VARIABLE)
    try:
        return float(given or PATIENCE_SECONDS)
    except ValueError:
        raise UserError(PATIENCE_VARIABLE, "not a number of seconds", value=given) from None


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
