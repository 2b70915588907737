"""What a step says while it works: how much it has done, published for the process that shows it, and lines."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ncsn import storage
from ncsn.storage.heartbeat import LEASE_SECONDS, Lease, LeaseExpired
from ncsn.storage.retry import limited

_LAST_SECONDS = 5.0  # longest wait for the last progress to be written


@dataclass(eq=False)
class Progress:
    """Counts the units of work that are done; this class tells nobody. A pickled copy goes on from the same count."""

    done: int = 0
    total: int = 0
    unit: str = ""
    text: str = ""

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        """From now on `advance` counts from `done` up to `total` of `unit`, a plural such as images."""
        self.done, self.total, self.unit = min(done, total), total, unit
        self.changed()

    def advance(self, n: int = 1) -> None:
        """`n` more units are done; then `check_lease`, unless these are the last."""
        self.done = min(self.done + n, self.total)  # the last batch may go beyond the total
        self.changed()
        if self.done < self.total:
            self.check_lease()

    def check_lease(self) -> None:
        """Raise `LeaseExpired`, which ends the work, if it has a launcher that is gone."""

    def note(self, text: str) -> None:
        """Show this next to the numbers from now on."""
        self.text = text
        self.changed()

    def changed(self) -> None:
        """Tell somebody; called after each of the others."""


def read_progress(uri: str) -> Progress | None:
    """The last progress that was published; None if there is none, or the store does not answer at once."""
    try:
        with limited(0):
            record = storage.find_json(uri)
    except OSError:
        return None
    return None if record is None else Progress(**record)


class PublishedProgress(Progress):
    """Publishes the progress at `uri`, at most once per `interval` seconds.

    `lease` is the URI of the lease of the launcher, if there is one.
    """

    # A thread writes, so that the work waits for the store only at the end, and then not for long. An error of the
    # store stops nothing.

    def __init__(self, uri: str, *, lease: str | None = None, interval: float = 1.0, **count: Any) -> None:
        super().__init__(**count)
        self._uri, self._lease, self._interval = uri, Lease(lease) if lease else None, interval
        self._record: dict[str, Any] | None = None  # to write
        self._is_last = False
        self._news = threading.Condition()
        self._writer: threading.Thread | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        lease = self._lease.uri if self._lease else None
        return partial(PublishedProgress, self._uri, lease=lease, interval=self._interval, **asdict(self)), ()

    def check_lease(self) -> None:
        if self._lease is not None and self._lease.expired():
            what = f"no launcher has renewed a lease in {self._lease.uri} for {LEASE_SECONDS:g} s"
            raise LeaseExpired(f"{what}: stopped; {self.done:,} of {self.total:,} {self.unit} were done")

    def changed(self) -> None:
        if not self.total:
            return
        with self._news:
            self._record, self._is_last = asdict(self), self.done >= self.total
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="progress", daemon=True)
                self._writer.start()
            self._news.notify_all()
            if self._is_last:
                self._news.wait_for(lambda: self._record is None, _LAST_SECONDS)

    def _write(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._record is not None)
                record = self._record
            pause = self._interval
            try:
                with limited(0):
                    storage.write_json(self._uri, record)
            except OSError:
                pause *= 30
            with self._news:
                if self._record is record:
                    self._record = None
                    self._news.notify_all()
                    if self._is_last:
                        self._writer = None
                        return
                self._news.wait_for(lambda: self._is_last, pause)


def say(line: str, *, of_driver: bool = False) -> None:
    """Print a line for the person who waits, or one of the driver's log; the log of a KFP task is its stderr."""
    try:
        if (show := getattr(sys.stderr, "show", None)) is not None:  # the output of a command goes to a file
            show(line, of_driver=of_driver)
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except BrokenPipeError:
        # Where a task is terminated, who reads its stderr may end first. An error here would pass for the step's, and
        # what is still in Python's buffer would change the exit code at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    except RuntimeError:  # this is the answer to a signal that interrupts such a write, whose buffer takes no other
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())
