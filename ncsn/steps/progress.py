"""How far a step is, as a small file in the run's folder.

The step may run in another process or on another machine than the person who waits for it, so progress travels
through the store: whoever shows a bar polls the file.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ncsn import storage
from ncsn.storage.heartbeat import Lease
from ncsn.storage.retry import limited

LAST_SECONDS = 5.0
"""Longest wait for the last record to be written."""


@dataclass
class ProgressFile:
    """Publishes `{"done", "total", "unit"}` and perhaps a `note` at `uri`, at most once per `interval` seconds.

    A thread writes, so that the work never waits for the store, but for the last record, and then not for long. A store
    that cannot be written stops nothing. Picklable, so that a Ray worker can carry it.
    """

    uri: str
    unit: str
    interval: float = 1.0
    _note: str = field(default="", repr=False)
    _told: tuple[int, int] | None = field(default=None, init=False, repr=False)
    _record: dict[str, Any] | None = field(default=None, init=False, repr=False)
    _news: threading.Condition = field(default_factory=threading.Condition, init=False, repr=False)
    _writer: threading.Thread | None = field(default=None, init=False, repr=False)

    def __reduce__(self) -> tuple[type[ProgressFile], tuple[str, str, float, str]]:
        """The thread stays here."""
        return ProgressFile, (self.uri, self.unit, self.interval, self._note)

    def say(self, note: str) -> None:
        """Show this beside the numbers from now on."""
        self._note = note
        if self._told is not None:
            self(*self._told)

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` of `total` units are done."""
        self._told = (done, total)
        record = {"done": done, "total": total, "unit": self.unit} | ({"note": self._note} if self._note else {})
        with self._news:
            self._record = record
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="progress", daemon=True)
                self._writer.start()
            self._news.notify_all()
            if done >= total:
                self._news.wait_for(lambda: self._record is None, LAST_SECONDS)

    def _write(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._record is not None)
                record = self._record
            pause = self.interval
            try:
                with limited(0):
                    storage.write_text(self.uri, json.dumps(record))
            except OSError:
                pause *= 30
            with self._news:
                if self._record is record:
                    self._record = None
                    self._news.notify_all()
                    if _is_last(record):
                        self._writer = None
                        return
                self._news.wait_for(lambda: _is_last(self._record), pause)


def _is_last(record: dict[str, Any] | None) -> bool:
    return record is not None and record["done"] >= record["total"]


def while_leased(progress: Callable[[int, int], None], lease: str | None, *, kept: str) -> Callable[[int, int], None]:
    """`progress`, and the end of the work when its launcher is gone.

    Args:
        progress: Called with (done, total).
        lease: URI of the launcher's heartbeat, or None.
        kept: What is saved then, with `{done}` and `{total}`, for the message.

    Returns:
        A function of (done, total) that raises `LeaseExpired` when the lease has.
    """
    if lease is None:
        return progress
    watched = Lease(lease)

    def update(done: int, total: int) -> None:
        progress(done, total)
        if done < total:
            watched.require(kept.format(done=done, total=total))

    return update
