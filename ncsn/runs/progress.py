"""The progress of a step, which another process shows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ncsn import storage
from ncsn.runs.folder import RunFolder
from ncsn.storage.heartbeat import Lease
from ncsn.storage.retry import limited

_LAST_SECONDS = 5.0  # longest wait for the last progress to be written


@dataclass(frozen=True)
class StepProgress:
    """How much of its work a step has done, and its note."""

    done: int
    total: int
    unit: str
    note: str = ""


def read_progress(folder: RunFolder, step: str) -> StepProgress | None:
    """The last progress of `step`; None if there is none, or the store does not answer at once."""
    try:
        with limited(0):
            record = storage.find_json(folder.step(step, "progress.json"))
    except OSError:
        return None
    return None if record is None else StepProgress(**record)


@dataclass
class ProgressFile:
    """Publishes how much of the work is done at `uri`, at most once per `interval` seconds. Picklable."""

    # A thread writes, so that the work waits for the store only at the end, and then not for long. An error of the
    # store stops nothing.

    uri: str
    unit: str
    interval: float = 1.0
    _note: str = field(default="", repr=False)
    _told: tuple[int, int] | None = field(default=None, init=False, repr=False)
    _record: dict[str, Any] | None = field(default=None, init=False, repr=False)
    _news: threading.Condition = field(default_factory=threading.Condition, init=False, repr=False)
    _writer: threading.Thread | None = field(default=None, init=False, repr=False)

    def __reduce__(self) -> tuple[type[ProgressFile], tuple[str, str, float, str]]:
        return ProgressFile, (self.uri, self.unit, self.interval, self._note)

    def say(self, note: str) -> None:
        """Add a note to the numbers from now on."""
        self._note = note
        if self._told is not None:
            self(*self._told)

    def __call__(self, done: int, total: int) -> None:
        """Publish that `done` of `total` units are done."""
        self._told = (done, total)
        record = {"done": done, "total": total, "unit": self.unit} | ({"note": self._note} if self._note else {})
        with self._news:
            self._record = record
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="progress", daemon=True)
                self._writer.start()
            self._news.notify_all()
            if done >= total:
                self._news.wait_for(lambda: self._record is None, _LAST_SECONDS)

    def _write(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._record is not None)
                record = self._record
            pause = self.interval
            try:
                with limited(0):
                    storage.write_json(self.uri, record)
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
    """`progress`, which raises `LeaseExpired` when the launcher is gone, with `kept` about `{done}` of `{total}`."""
    if lease is None:
        return progress
    watched = Lease(lease)

    def update(done: int, total: int) -> None:
        progress(done, total)
        if done < total:
            watched.require(kept.format(done=done, total=total))

    return update
