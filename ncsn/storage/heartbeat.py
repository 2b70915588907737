"""Heartbeats in the store, so that work whose launchers are gone ends by itself.

Each launcher renews a small object of its own, its lease, in a folder that belongs to the work. A worker compares the
dates of these objects with those that it saw before, by its own clock. Who looks only once compares them with the date
of an object that it writes. So the clocks of two machines need not agree.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field

from ncsn import storage
from ncsn.storage.retry import limited

RENEW_SECONDS = 30.0
LEASE_SECONDS = 300.0  # without a renewal for so long, the launcher is given up


class LeaseExpired(RuntimeError):
    """The launchers of this work are gone, or have told it to end."""


def is_abandoned(uri: str, *, seconds: float = LEASE_SECONDS) -> bool:
    """Whether the leases in the folder were not renewed for so long; False without a lease."""
    return seconds < _silence_of_all(uri) < math.inf


def _silence_of_all(uri: str) -> float:
    probe = f".now-{uuid.uuid4().hex}"
    silence = _silence(uri, probe)
    storage.delete(storage.join(uri, probe))
    return silence


def _silence(uri: str, name: str) -> float:
    """Writes the object `name` in the folder; seconds since the last renewal of another lease, infinite without one."""
    storage.write_bytes(storage.join(uri, name), b"")
    dates = {entry.path: entry.changed for entry in storage.list_entries(uri)}
    now = dates.pop(name, 0.0)  # gone only if somebody deletes the folder
    return now - max((date for other, date in dates.items() if not other.startswith(".")), default=-math.inf)


@dataclass
class Lease:
    """The worker's side. Picklable before its first use."""

    uri: str  # the folder of the launchers' leases
    check_seconds: float = 10.0  # between two looks at it
    _seen: set[tuple[str, float]] | None = field(default=None, repr=False)
    _changed_at: float = field(default=0.0, repr=False)
    _next_look: float = field(default=0.0, repr=False)

    def expired(self) -> bool:
        """Whether no lease was renewed for too long; False while the store cannot be read."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + self.check_seconds
        try:
            with limited(0):
                found = storage.list_entries(self.uri)
        except OSError:
            self._changed_at = now
            return False
        seen = {(entry.path, entry.changed) for entry in found if not entry.path.startswith(".")}
        if self._seen is None or seen - self._seen:
            self._seen, self._changed_at = seen, now
        return now - self._changed_at > LEASE_SECONDS


class Heartbeat:
    """The launcher's side: a context in which a thread renews the launcher's lease in the folder `uri`.

    `id` names the launcher and its lease. `alone` says whether no other lease was younger than LEASE_SECONDS when this
    one was renewed last or left; a signal handler may read it. The lease goes with the context, unless the launcher
    sets `stays`, since the work runs on and may be attached to until the lease is old.
    """

    def __init__(self, uri: str) -> None:
        self.id, self.alone, self.stays = uuid.uuid4().hex, False, False
        self._uri, self._ended, self._left = uri, threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._renew()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        with suppress(OSError), limited(0):
            if not self.stays:
                self._delete()
            elif self._left:
                self._renew()

    def leave(self) -> None:
        """Take the lease away, and then see whether there are others: of launchers that leave at once one is last."""
        self._end()
        self._left = True
        with suppress(OSError), limited(RENEW_SECONDS):
            self._delete()
            self.alone = _silence_of_all(self._uri) > LEASE_SECONDS

    def _end(self) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    def _beat(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with suppress(OSError), limited(RENEW_SECONDS):  # that it fails is no loss: the lease outlasts several
                self._renew()

    def _delete(self) -> None:
        storage.delete(storage.join(self._uri, self.id))

    def _renew(self) -> None:
        self.alone = _silence(self._uri, self.id) > LEASE_SECONDS
