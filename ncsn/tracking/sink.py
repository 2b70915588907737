"""Metrics and pictures from a training loop to MLflow, without the loop ever waiting for it.

`log` writes to a journal on the local disk and returns; a thread sends what is there in batches. While the server is
away the journal grows and training goes on; a process that is killed leaves it to the next one.
"""

from __future__ import annotations

import base64
import io
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ncsn.storage import retry
from ncsn.tracking.client import client_at, one_line, shown
from ncsn.tracking.delivery import Delivery, patience
from ncsn.tracking.journal import Entry, Journal, JournalInUseError, now

SEND_EVERY = 2.0
"""Seconds between requests, so that numbers of several steps share one."""
LONGEST_WAIT = 10.0
"""Seconds at most between two tries at a server that is away."""
CLOSING_WAIT = 0.5
"""The same once the sink is being closed and somebody waits."""
REQUEST_SECONDS = 10
"""How long a server may take to answer."""
NAME = re.compile(r"[/\w.\- :]{1,250}")
"""Names that MLflow takes: one bad name would cost the whole batch."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SinkReport:
    """What became of what a sink was given.

    Attributes:
        sent: Metrics and pictures that the server has, as far as this process sent them.
        unsent: Those that wait in the journal, for the next command of the run to send them.
        lost: Those that can never arrive.
        reason: Why some were not sent; empty if all were.
    """

    sent: int
    unsent: int
    lost: int = 0
    reason: str = ""


class MetricsSink:
    """Sends metrics and pictures of one MLflow run from a thread of its own.

    Picklable: a copy in another process opens the journal there. `log` and `log_picture` neither block nor raise. The
    images seen must grow from call to call: what a resumed run repeats is recorded once. Meant for a worker process:
    it shortens MLflow's own retries there, which could outlast the end of training.

    Example:
        with sink:
            sink.log({"train/loss": 0.7}, images_seen=1280)
    """

    def __init__(self, uri: str, run_id: str, *, folder: str) -> None:
        """Name the target: `uri` of the tracking server, as `StepRun.uri`, the run, and the URI for its journal."""
        self.uri, self.run_id, self.folder = uri, run_id, folder
        self._journal: Journal | None = None
        self._early: list[Entry] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._deadline: float | None = None
        self._sent = self._lost = self._failures = 0
        self._reason = ""

    def __reduce__(self) -> tuple[object, tuple[str, str, str]]:
        return _sink, (self.uri, self.run_id, self.folder)

    def __enter__(self) -> MetricsSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def failing(self) -> bool:
        """Whether the last try to send did not reach the server."""
        return self._failures > 0

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Hand over the values of one moment.

        Args:
            metrics: Name `area/what` -> number, or anything that `float` takes. The last name stands for the series:
                it must be the same in each call that continues one.
            images_seen: Training images consumed so far: MLflow's step.
        """
        values: dict[str, float] = {}
        for name, value in metrics.items():
            if not NAME.fullmatch(name):
                self._lose(1, f"metric name {name!r} is not valid")
                continue
            try:
                values[name] = float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's, for several elements
                self._lose(1, f"{name} = {value!r} is not a number")
        if values:
            self._record(Entry(next(reversed(values)), images_seen, now(), metrics=values))

    def log_picture(self, picture: npt.NDArray[np.uint8], name: str, images_seen: int) -> None:
        """Hand over one picture of a series, uint8 [H, W, C], C = 1 or 3; MLflow's page shows it with a slider."""
        buffer = io.BytesIO()
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, format="PNG")
        self._record(Entry(name, images_seen, now(), png=base64.b64encode(buffer.getvalue()).decode()))

    def close(self, *, seconds: float = 30.0) -> SinkReport:
        """Send what is left, for at most `seconds`; say what could not be sent, also as a warning in the log."""
        with self._wake:
            self._deadline = time.monotonic() + seconds
            if self._early:
                self._open(patience=seconds)
            self._lost += sum(entry.count for entry in self._early)
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(seconds + 1)
        with self._wake:
            unsent = self._journal.unsent if self._journal else 0
            reason = self._reason if unsent or self._lost else ""
            report = SinkReport(sent=self._sent, unsent=unsent, lost=self._lost, reason=reason)
        if report.reason:
            _logger.warning(
                "of %d metrics %d did not reach %s and wait in %s, %d are lost: %s",
                *(report.sent + report.unsent + report.lost, report.unsent, shown(self.uri)),
                *(self._journal.path if self._journal else "no journal", report.lost, report.reason),
            )
        return report

    def _record(self, entry: Entry) -> None:
        with self._wake:
            self._early.append(entry)
            self._open()

    def _open(self, *, patience: float = 0.0) -> None:
        """Move what was handed over to the journal; in memory it waits for another process to let go of that."""
        try:
            if self._journal is None:
                self._journal = Journal(self.folder, self.run_id, patience=patience)
                self._thread = threading.Thread(target=self._run, name="mlflow-metrics", daemon=True)
                self._thread.start()
            for entry in self._early:
                self._journal.append(entry)
            self._early.clear()
        except JournalInUseError as error:
            self._reason = one_line(error)
        except OSError as error:
            self._lost += sum(entry.count for entry in self._early)
            self._early.clear()
            self._reason = one_line(error)

    def _lose(self, count: int, reason: str) -> None:
        with self._wake:
            self._lost += count
            self._reason = reason

    def _run(self) -> None:
        assert self._journal is not None
        delivery: Delivery | None = None
        with patience(retries=0, timeout=REQUEST_SECONDS):
            while self._wait():
                try:
                    delivery = delivery or Delivery(client_at(self.uri), self.run_id, self._journal)
                    self._send(delivery, self._journal)
                    self._failures = 0
                except Exception as error:  # noqa: BLE001  (whatever the server or the disk does, training goes on)
                    self._reason = one_line(error)
                    self._failures += 1
                self._keep(self._journal.secure)
        with self._wake:
            self._keep(self._journal.close)

    def _keep(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except OSError as error:
            self._reason = one_line(error)

    def _wait(self) -> bool:
        """Sleep until the next try is due; False when there is nothing more to do."""
        assert self._journal is not None
        with self._wake:
            if self._deadline is None:
                self._wake.wait(min(SEND_EVERY * 2.0 ** min(self._failures, 8), LONGEST_WAIT))
            elif self._failures:
                self._wake.wait(CLOSING_WAIT)
            if self._deadline is None:
                return True
            return self._journal.unsent > 0 and time.monotonic() < self._deadline

    def _send(self, delivery: Delivery, journal: Journal) -> None:
        """Send all that is unsent, oldest first; an entry counts as sent when the server has answered for it."""
        while journal.unsent and (self._deadline is None or time.monotonic() < self._deadline):
            retry.refuse("tracking")
            batch, sent = delivery.send_batch()
            with self._wake:
                journal.acknowledge(batch)
                self._sent += sent
                self._lost += delivery.lost
                self._reason = delivery.reason or self._reason
                delivery.lost = 0


def _sink(uri: str, run_id: str, folder: str) -> MetricsSink:
    return MetricsSink(uri, run_id, folder=folder)
