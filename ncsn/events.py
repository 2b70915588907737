"""Events for one webhook: a run has started, finished or failed; a version was registered or promoted.

A thread sends them in order, each again while the receiver is away, so that they neither delay nor fail the work. At
the end of the process the last ones have a few seconds. A delivery is signed as MLflow signs those of its own webhooks.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import hmac
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from queue import SimpleQueue
from threading import Thread
from typing import Literal

from ncsn.clock import utc_now
from ncsn.environment import KFP_RUN_ID
from ncsn.storage.retry import Retry

# Variables. The address may be a secret itself, so nothing shows it.
WEBHOOK = "NCSN_WEBHOOK_URL"
SECRET = "NCSN_WEBHOOK_SECRET"  # noqa: S105 - the name of a variable

TRY_SECONDS = 600.0  # for which an event is sent again while the receiver is away
END_SECONDS = 10.0  # for all that waits when the process ends
_ANSWER_SECONDS = 10.0
_BUSY = 429

Event = Literal["started", "finished", "failed", "registered", "promoted"]

_logger = logging.getLogger(__name__)


def tell(event: Event, **facts: str) -> None:
    """Send an event with these facts, if there is a webhook. It neither waits nor raises."""
    if os.environ.get(WEBHOOK):
        kfp_run = os.environ.get(KFP_RUN_ID, "")
        sent = {"id": str(uuid.uuid4()), "event": event, "time": utc_now(), **facts, "kfp_run": kfp_run}
        _sender().put({name: value for name, value in sent.items() if value})


@contextmanager
def announced(run: str, *, root: str, step: str = "") -> Iterator[None]:
    """Tell that the work in the block on a run of the store `root`, perhaps one step of it, starts and how it ends."""
    where = {"run": run, "root": root, "step": step}
    tell("started", **where)
    try:
        yield
    except BaseException as error:
        failed = isinstance(error, Exception)
        reason = str(error).partition("\n")[0] or type(error).__name__
        tell("failed", **where, status="FAILED" if failed else "KILLED", reason=reason if failed else "interrupted")
        raise
    tell("finished", **where, status="FINISHED")


@cache
def _sender() -> SimpleQueue[dict[str, str] | None]:
    """What the thread sends; None ends it."""
    waiting = SimpleQueue[dict[str, str] | None]()

    def run() -> None:
        while (event := waiting.get()) is not None:
            try:
                Retry("the webhook", TRY_SECONDS)(lambda: _send(event))
            except Exception as error:  # noqa: BLE001 - whatever the receiver does, the work goes on
                _logger.warning("the webhook did not take the event %s: %s", event["event"], error)

    def end() -> None:
        waiting.put(None)
        thread.join(END_SECONDS)
        if thread.is_alive():
            _logger.warning("the webhook has not taken the last events within %g s of the end", END_SECONDS)

    thread = Thread(target=run, name="events", daemon=True)
    thread.start()
    atexit.register(end)
    return waiting


def _send(event: dict[str, str]) -> None:
    """Send once; a `ConnectionError` if another try may help."""
    import requests

    body = json.dumps(event)
    headers = {"Content-Type": "application/json", "X-NCSN-Delivery-Id": event["id"]}
    headers["X-NCSN-Timestamp"] = now = str(int(time.time()))  # of this try, so that a late one is no replay
    if secret := os.environ.get(SECRET):
        signed = hmac.digest(secret.encode(), f"{event['id']}.{now}.{body}".encode(), hashlib.sha256)
        headers["X-NCSN-Signature"] = f"v1,{base64.b64encode(signed).decode()}"
    try:
        status = requests.post(
            os.environ[WEBHOOK], data=body, headers=headers, timeout=_ANSWER_SECONDS, allow_redirects=False
        ).status_code
    except (requests.ConnectionError, requests.Timeout) as error:
        raise ConnectionError(type(error).__name__) from None  # its message has the address
    except requests.RequestException as error:
        raise ValueError(f"{WEBHOOK} is no address for it: {type(error).__name__}") from None
    if status >= 500 or status == _BUSY:
        raise ConnectionError(f"HTTP {status}")
    if not 200 <= status < 300:
        raise ValueError(f"HTTP {status}")
