"""A heartbeat in the store, so that work whose launcher is gone ends by itself.

The launcher renews a small object, the lease. The worker compares its content with what it read before, by its own
clock: the clocks of two machines need not agree. A worker that gives up writes so next to the lease, so that a retry
by the cluster, whose clock starts again, ends at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from ncsn.storage import files
from ncsn.storage.retry import limited

RENEW_SECONDS = 30.0
LEASE_SECONDS = 300.0  # without a renewal for so long, the launcher is given up

_GIVEN_UP = ".given-up"

T = TypeVar("T")


class LeaseExpired(RuntimeError):
    """The launcher of this work is gone."""


@dataclass
class Lease:
    """The worker's side. Picklable before its first use."""

    uri: str  # the object that the launcher renews
    check_seconds: float = 10.0  # between two looks at it
    _seen: bytes = field(default=b"", repr=False)
    _changed_at: float = field(default=0.0, repr=False)
    _next_look: float = field(default=0.0, repr=False)
    _looked: bool = field(default=False, repr=False)
    _given_up: bytes | None = field(default=None, repr=False)

    def expired(self) -> bool:
        """Whether the lease was not renewed for too long; False while the store cannot be read."""
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
            self._given_up = self._seen
            with suppress(OSError), limited(0):
                files.write_bytes(self.uri + _GIVEN_UP, self._seen)
        return content == self._given_up

    def require(self, kept: str) -> None:
        """Raise `LeaseExpired` if it has expired; `kept` says in the message what is saved."""
        if self.expired():
            raise LeaseExpired(f"the launcher has not renewed {self.uri} for {LEASE_SECONDS:g} s: stopped; {kept}")


class Heartbeat:
    """The launcher's side: a context in which a thread renews the lease at `uri` and calls `also` at each beat."""

    def __init__(self, uri: str, *, also: Callable[[], None] | None = None, every: float = RENEW_SECONDS) -> None:
        self._uri, self._also, self._every = uri, also, every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._renew()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    def _beat(self) -> None:
        while not self._ended.wait(self._every):
            # A beat that fails is no loss: the lease outlasts several. The cluster is told even so, since a launcher
            # that cannot reach the store is not gone.
            with suppress(OSError), limited(self._every):
                self._renew()
            if self._also is not None:
                self._also()

    def _renew(self) -> None:
        files.write_json(self._uri, {"renewed_at": time.time()})


def _read(uri: str, *, missing: T) -> bytes | T:
    try:
        return files.read_bytes(uri)
    except FileNotFoundError:
        return missing
