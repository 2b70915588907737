"""A heartbeat in the store, so that work whose launcher is gone ends by itself.

The launcher renews a small object, the lease. The worker compares its content with what it read before, by its own
clock: the clocks of two machines need not agree.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from ncsn import storage
from ncsn.storage.retry import limited

RENEW_SECONDS = 30.0
LEASE_SECONDS = 300.0  # without a renewal for so long, the launcher is given up


class LeaseExpired(RuntimeError):
    """The launcher of this work is gone, or has told it to end."""


@dataclass
class Lease:
    """The worker's side. Picklable before its first use."""

    uri: str  # the object that the launcher renews
    check_seconds: float = 10.0  # between two looks at it
    _seen: bytes | None = field(default=None, repr=False)
    _changed_at: float = field(default=0.0, repr=False)
    _next_look: float = field(default=0.0, repr=False)

    def expired(self) -> bool:
        """Whether the lease was not renewed for too long; False while the store cannot be read."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + self.check_seconds
        try:
            with limited(0):
                content = storage.read_bytes(self.uri)
        except FileNotFoundError:
            content = self._seen or b""
        except OSError:
            self._changed_at = now
            return False
        if content != self._seen:
            self._seen, self._changed_at = content, now
        return now - self._changed_at > LEASE_SECONDS

    def require(self, done: str) -> None:
        """Raise `LeaseExpired` if it has expired; `done` says in the message how far the work is."""
        if self.expired():
            raise LeaseExpired(f"the launcher has not renewed {self.uri} for {LEASE_SECONDS:g} s: stopped; {done}")


class Heartbeat:
    """The launcher's side: a context in which a thread renews the lease at `uri`."""

    def __init__(self, uri: str, *, every: float = RENEW_SECONDS) -> None:
        self._uri, self._every = uri, every
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
            with suppress(OSError), limited(self._every):  # a beat that fails is no loss: the lease outlasts several
                self._renew()

    def _renew(self) -> None:
        storage.write_json(self._uri, {"renewed_at": time.time()})
