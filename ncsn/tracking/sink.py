"""Metrics of a training loop on their way to MLflow: never slow, never fatal.

The loop hands over numbers and goes on; a thread of its own sends them in batches and, while the server is away,
keeps them in memory and tries again.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ncsn.tracking.connection import client_at, one_line, shown

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

BATCH = 1000
"""Metrics per request: MLflow's limit."""
CAPACITY = 200_000
"""Metrics kept while the server is away, about 50 MB; the oldest give way."""
SEND_EVERY = 2.0
"""Seconds between requests, so that numbers of several steps share one."""
LONGEST_WAIT = 10.0
"""Seconds at most between two tries at a server that is away."""
CLOSING_WAIT = 0.5
"""The same once the sink is being closed and somebody waits."""
NAME = re.compile(r"[/\w.\- :]{1,250}")
"""Names that MLflow takes: one bad name would cost the whole batch."""
HOPELESS = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"})
"""Answers that waiting does not change, such as that of a deleted run."""

Entry = tuple[str, float, int, int]
"""Name, value, time in ms, images_seen."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SinkReport:
    """What became of the metrics that a sink was given."""

    sent: int
    unsent: int
    reason: str = ""
    """Why some were not sent; empty if all were."""


class MetricsSink:
    """Sends metrics of one MLflow run from a thread of its own.

    Picklable: a copy in another process starts empty, with its own thread. `log` neither blocks nor raises. Meant
    for a worker process: it shortens MLflow's own retries there, which could outlast the end of training.

    Example:
        with sink:
            sink.log({"train/loss": 0.7}, images_seen=1280)
    """

    def __init__(self, uri: str, run_id: str) -> None:
        """Name the target: `uri` of the tracking server, as `StepRun.uri`, and the run."""
        self.uri = uri
        self.run_id = run_id
        self._queue: deque[Entry] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._deadline: float | None = None
        self._sent = 0
        self._lost = 0
        self._reason = ""
        self._failures = 0

    def __reduce__(self) -> tuple[type[MetricsSink], tuple[str, str]]:
        return MetricsSink, (self.uri, self.run_id)

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
            metrics: Name `area/what` -> number, or anything that `float` takes.
            images_seen: Training images consumed so far: MLflow's step.
        """
        now = int(time.time() * 1000)
        entries: list[Entry] = []
        for name, value in metrics.items():
            if not NAME.fullmatch(name):
                self._lose(1, f"metric name {name!r} is not valid")
                continue
            try:
                entries.append((name, float(value), now, images_seen))
            except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's, for several elements
                self._lose(1, f"{name} = {value!r} is not a number")
        with self._wake:
            self._queue.extend(entries)
            overflow = max(len(self._queue) - CAPACITY, 0)
            for _ in range(overflow):
                self._queue.popleft()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mlflow-metrics", daemon=True)
                self._thread.start()
        if overflow:
            self._lose(overflow, "the server was away for too long")

    def close(self, *, seconds: float = 30.0) -> SinkReport:
        """Send what is left, for at most `seconds`; say what could not be sent, also as a warning in the log."""
        with self._wake:
            self._deadline = time.monotonic() + seconds
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(seconds + 1)
        with self._wake:
            unsent = self._lost + len(self._queue)
            report = SinkReport(sent=self._sent, unsent=unsent, reason=self._reason if unsent else "")
        if unsent:
            _logger.warning(
                "%d of %d metrics did not reach %s: %s", unsent, unsent + report.sent, shown(self.uri), report.reason
            )
        return report

    def _lose(self, count: int, reason: str) -> None:
        with self._wake:
            self._lost += count
            self._reason = reason

    def _run(self) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        client: MlflowClient | None = None
        while self._wait(self._failures):
            try:
                client = client or client_at(self.uri)
                self._send(client)
                self._failures = 0
            except Exception as error:  # noqa: BLE001  (whatever the server or the disk does, training goes on)
                self._reason = one_line(error)
                self._failures += 1

    def _wait(self, failures: int) -> bool:
        """Sleep until the next try is due; False when there is nothing more to do."""
        with self._wake:
            if self._deadline is None:
                self._wake.wait(min(SEND_EVERY * 2.0 ** min(failures, 8), LONGEST_WAIT))
            elif failures:
                self._wake.wait(CLOSING_WAIT)
            if self._deadline is None:
                return True
            return bool(self._queue) and time.monotonic() < self._deadline

    def _send(self, client: MlflowClient) -> None:
        """Send all that is queued, oldest first; an entry leaves the queue when the server has answered for it."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        while batch := self._oldest():
            try:
                client.log_batch(self.run_id, metrics=[Metric(*entry) for entry in batch], synchronous=True)
                self._sent += len(batch)
            except MlflowException as error:
                if error.error_code not in HOPELESS:
                    raise
                self._lose(len(batch), one_line(error))
            self._discard(batch)

    def _oldest(self) -> list[Entry]:
        with self._wake:
            return list(itertools.islice(self._queue, BATCH))

    def _discard(self, batch: list[Entry]) -> None:
        with self._wake:
            for entry in batch:
                # `log` drops the oldest entries of a full queue, perhaps some of this batch, in the same order.
                if self._queue and self._queue[0] is entry:
                    self._queue.popleft()
