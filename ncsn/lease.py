"""A sign of life in the store, so that work without a launcher ends by itself.

Whoever started the work renews a small object. Whoever does the work reads it and compares what it reads with what it
read before, on its own clock: the clocks of two machines need not agree.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ncsn import storage
from ncsn.patience import limited

RENEW_SECONDS = 30.0
LEASE_SECONDS = 300.0


class LeaseExpired(RuntimeError):
    """Nobody waits for this work any more."""


@dataclass
class Lease:
    """The worker's side. Picklable before its first use.

    Attributes:
        uri: The object that the launcher renews; it says for how long it may stay the same.
        check_seconds: How often to look at most.
    """

    uri: str
    check_seconds: float = 10.0
    _seen: dict[str, Any] = field(default_factory=dict, repr=False)
    _changed_at: float = field(default=0.0, repr=False)
    _next_look: float = field(default=0.0, repr=False)

    def expired(self) -> bool:
        """Whether the launcher has been silent for too long. A store that cannot be read says nothing of it."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + self.check_seconds
        try:
            with limited(0):
                content = storage.read_json(self.uri)
        except FileNotFoundError:
            content = self._seen
        except OSError:
            self._changed_at = now
            return False
        if content != self._seen or not self._changed_at:
            self._seen, self._changed_at = content, now
        return now - self._changed_at > self._patience()

    def require(self, kept: str) -> None:
        """End the work if nobody waits for it.

        Args:
            kept: What is saved, for the message.

        Raises:
            LeaseExpired: if the lease has expired.
        """
        if self.expired():
            raise LeaseExpired(f"the launcher has not renewed {self.uri} for {self._patience():g} s: stopped; {kept}")

    def _patience(self) -> float:
        return float(self._seen.get("seconds", LEASE_SECONDS))


class Heartbeat:
    """The launcher's side: a context that renews the lease at `uri` from a thread of its own.

    Args:
        uri: The object to renew.
        also: Called at each beat, after the object; what it raises is its own business.
        every: Seconds between two beats.
        lease: Seconds of silence after which the worker gives up.
    """

    def __init__(
        self, uri: str, *, also: Callable[[], None], every: float = RENEW_SECONDS, lease: float = LEASE_SECONDS
    ) -> None:
        self._uri, self._also, self._every, self._lease = uri, also, every, lease
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._renew()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    def _beat(self) -> None:
        while not self._ended.wait(self._every):
            try:
                self._renew()
            except OSError:  # the store is away: the next beat tries again, and the lease outlasts several
                continue
            self._also()

    def _renew(self) -> None:
        storage.write_text(self._uri, json.dumps({"renewed_at": time.time(), "seconds": self._lease}))
