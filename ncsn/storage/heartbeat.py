"""A sign of life in the store, so that work without a launcher ends by itself.

Whoever started the work renews a small object. Whoever does the work reads it and compares what it reads with what it
read before, on its own clock: the clocks of two machines need not agree. Work that gave the launcher up says so beside
the lease, so that a retry by the cluster, whose own clock begins again, ends at once.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

from ncsn.storage import files
from ncsn.storage.retry import limited

RENEW_SECONDS = 30.0
LEASE_SECONDS = 300.0
"""Silence after which the launcher is given up."""

_GIVEN_UP = ".given-up"

T = TypeVar("T")


class LeaseExpired(RuntimeError):
    """Nobody waits for this work any more."""


@dataclass
class Lease:
    """The worker's side. Picklable before its first use.

    Attributes:
        uri: The object that the launcher renews.
        check_seconds: How often to look at most.
    """

    uri: str
    check_seconds: float = 10.0
    _seen: bytes = field(default=b"", repr=False)
    _changed_at: float = field(default=0.0, repr=False)
    _next_look: float = field(default=0.0, repr=False)
    _looked: bool = field(default=False, repr=False)
    _given_up: bytes | None = field(default=None, repr=False)

    def expired(self) -> bool:
        """Whether the launcher has been silent for too long. A store that cannot be read says nothing of it."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + self.check_seconds
        try:
            with limited(0):
                content = _read(self.uri, missing=self._seen)
                if not self._looked:
                    self._given_up = _read(self.uri + _GIVEN_UP, missing=None)
        except OSError:
            self._changed_at = now
            return False
        if content != self._seen or not self._looked:
            self._seen, self._changed_at = content, now
        self._looked = True
        if content != self._given_up and now - self._changed_at > LEASE_SECONDS:
            self._give_up()
        return content == self._given_up

    def require(self, kept: str) -> None:
        """End the work if nobody waits for it.

        Args:
            kept: What is saved, for the message.

        Raises:
            LeaseExpired: if the lease has expired.
        """
        if self.expired():
            raise LeaseExpired(f"the launcher has not renewed {self.uri} for {LEASE_SECONDS:g} s: stopped; {kept}")

    def _give_up(self) -> None:
        self._given_up = self._seen
        with suppress(OSError), limited(0):
            files.write_bytes(self.uri + _GIVEN_UP, self._seen)


class Heartbeat:
    """The launcher's side: a context that renews the lease at `uri` from a thread of its own.

    Args:
        uri: The object to renew.
        also: Called at each beat, after the object; what it raises is its own business.
        every: Seconds between two beats.
    """

    def __init__(self, uri: str, *, also: Callable[[], None], every: float = RENEW_SECONDS) -> None:
        self._uri, self._also, self._every = uri, also, every
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
            # While the store is away the next beat tries again, and the lease outlasts several. The cluster is told all
            # the same: a launcher without a store is no launcher that is gone.
            with suppress(OSError), limited(self._every):
                self._renew()
            self._also()

    def _renew(self) -> None:
        files.write_text(self._uri, json.dumps({"renewed_at": time.time()}))


def _read(uri: str, *, missing: T) -> bytes | T:
    try:
        return files.read_bytes(uri)
    except FileNotFoundError:
        return missing
