"""Metrics and pictures to MLflow while training runs.

The run folder is the record and MLflow a view of it. `LiveMetrics` sends from the training process what it can, and
`ncsn.tracking.reconcile` sends the rest from the run folder. Both are harmless to repeat: an entry keeps its time, and
MLflow stores equal (name, time, step, value) once.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ncsn.process import now_ms
from ncsn.tracking.client import client_at, one_line, set_tags, shown

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SEND_EVERY = 2.0  # seconds between requests, so that the metrics of several steps share one
LONGEST_WAIT = 10.0  # longest wait in seconds between two attempts while the server is unreachable
CLOSING_WAIT = 0.5  # the same while `close` waits
REQUEST_SECONDS = 10  # how long the server may take to answer
MOST_WAITING = 1000  # entries kept while the server is unreachable; older ones are left to `reconcile`
BATCH = 1000  # metrics per request: MLflow's limit
THUMBNAIL = 256  # side in pixels of the small copy of a picture that MLflow shows in a series
NAME = re.compile(r"[/\w.\- :]{1,250}")  # names that MLflow accepts: one bad name would cost the whole batch
# Error codes that waiting does not change, for example for a deleted run.
PERMANENT = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"})

_RETRIES, _TIMEOUT = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
_environment = threading.Lock()
_limits: list[dict[str, str]] = []  # of the blocks that are open now, in several threads
_before: dict[str, str | None] = {}  # the variables outside of all of them
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One point of the curves, or one picture."""

    series: str  # of each series a step is recorded once
    step: int  # images seen
    time: int  # milliseconds since 1970
    metrics: Mapping[str, float] = field(default_factory=dict)
    png: bytes = b""

    @property
    def count(self) -> int:
        """Metrics, or 1 for a picture."""
        return len(self.metrics) or 1


@dataclass(frozen=True)
class LiveReport:
    """What became of the metrics and pictures given to a `LiveMetrics`."""

    sent: int
    unsent: int
    reason: str = ""  # why some are unsent


class LiveMetrics:
    """Sends metrics and pictures of one MLflow run from a thread. `log` and `log_picture` neither block nor raise.

    Picklable: a copy in another process starts with nothing to send. Meant for a worker process: it shortens MLflow's
    retries there, which could outlast the training.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._waiting: list[Entry] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._deadline: float | None = None
        self._sent = self._unsent = self._failures = 0
        self._reason = ""

    def __reduce__(self) -> tuple[type[LiveMetrics], tuple[str, str]]:
        return type(self), (self.uri, self.run_id)

    def log(self, metrics: Mapping[str, float], images_seen: int, when: int | None = None) -> None:
        """Take the metrics of one moment, in milliseconds since 1970; now, if None.

        The last name stands for the series: it must be the same in each call that continues one.
        """
        values: dict[str, float] = {}
        for name, value in metrics.items():
            if not NAME.fullmatch(name):
                self._reject(f"metric name {name!r} is not valid")
                continue
            try:
                values[name] = float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's, for several elements
                self._reject(f"{name} = {value!r} is not a number")
        if values:
            self._take(Entry(next(reversed(values)), images_seen, when or now_ms(), values))

    def log_picture(self, png: bytes, name: str, images_seen: int, when: int | None = None) -> None:
        """Take one picture of a series, which MLflow shows with a slider."""
        self._take(Entry(name, images_seen, when or now_ms(), png=png))

    def close(self, *, seconds: float = 30.0) -> LiveReport:
        """Send the remaining entries, for at most `seconds`; a warning in the log counts those unsent."""
        with self._wake:
            self._deadline = time.monotonic() + seconds
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(seconds + 1)
        with self._wake:
            unsent = self._unsent + sum(entry.count for entry in self._waiting)
            report = LiveReport(self._sent, unsent, self._reason if unsent else "")
        if unsent:
            _logger.warning(
                "%d metrics have not reached %s: %s; the end of the step, or the next command of the run, sends them",
                unsent,
                shown(self.uri),
                report.reason,
            )
        return report

    def _reject(self, reason: str) -> None:
        with self._wake:
            self._unsent += 1
            self._reason = reason

    def _take(self, entry: Entry) -> None:
        with self._wake:
            self._waiting.append(entry)
            if len(self._waiting) > MOST_WAITING:
                self._unsent += self._waiting.pop(0).count
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mlflow-metrics", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        sender: Sender | None = None
        with request_limits(retries=0, seconds=REQUEST_SECONDS):
            while self._wait():
                try:
                    sender = sender or Sender(client_at(self.uri), self.run_id)
                    self._send(sender)
                    self._failures = 0
                except Exception as error:  # noqa: BLE001  (whatever the server does, training goes on)
                    self._reason = one_line(error)
                    self._failures += 1

    def _wait(self) -> bool:
        """Sleep until the next attempt is due; False when there is nothing more to do."""
        with self._wake:
            if self._deadline is None:
                self._wake.wait(min(SEND_EVERY * 2.0 ** min(self._failures, 8), LONGEST_WAIT))
            elif self._failures:
                self._wake.wait(CLOSING_WAIT)
            if self._deadline is None:
                return True
            return bool(self._waiting) and time.monotonic() < self._deadline

    def _send(self, sender: Sender) -> None:
        """Send all that waits, oldest first; an entry waits until the server has answered for it."""
        from mlflow.exceptions import MlflowException

        while (batch := self._oldest()) and (self._deadline is None or time.monotonic() < self._deadline):
            sent = refused = 0
            try:
                sent = sender.send(batch)
            except MlflowException as error:
                if error.error_code not in PERMANENT:
                    raise
                refused, self._reason = sum(entry.count for entry in batch), one_line(error)
            done = set(map(id, batch))
            with self._wake:
                self._waiting = [entry for entry in self._waiting if id(entry) not in done]
                self._sent += sent
                self._unsent += refused

    def _oldest(self) -> list[Entry]:
        """The first entries, with about as many metrics as a request takes."""
        with self._wake:
            fitting = sum(count <= BATCH for count in itertools.accumulate(entry.count for entry in self._waiting))
            return self._waiting[: max(fitting, 1)]


class Sender:
    """Sends to one run the entries that it does not have yet; asks once per series which those are."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._known: dict[str, set[int]] = {}

    def send(self, entries: Iterable[Entry]) -> int:
        """How many metrics and pictures were sent; an `MlflowException` if the server does not take them now."""
        new: dict[tuple[str, int], Entry] = {}
        for entry in entries:
            if not self.has(entry.series, entry.step, picture=bool(entry.png)):
                new.setdefault((entry.series, entry.step), entry)
        log_metrics(self._client, self._run_id, new.values())
        for entry in new.values():
            if entry.png:
                self._send_picture(entry)
            self._known[entry.series].add(entry.step)
        return sum(entry.count for entry in new.values())

    def has(self, series: str, step: int, *, picture: bool) -> bool:
        """Whether the run has this entry."""
        if series not in self._known:
            if picture:
                self._known[series] = self._pictures(series)
            else:
                history = self._client.get_metric_history(self._run_id, series)
                self._known[series] = {metric.step for metric in history}
        return step in self._known[series]

    def _pictures(self, series: str) -> set[int]:
        prefix = _picture_prefix(series)
        names = [Path(file.path).name for file in self._client.list_artifacts(self._run_id, "images")]
        files = Counter(int(name.removeprefix(prefix).partition("+")[0]) for name in names if name.startswith(prefix))
        return {step for step, count in files.items() if count >= 2}  # the picture and its small copy

    def _send_picture(self, entry: Entry) -> None:
        """As `MlflowClient.log_image`, but under a name that sending again does not change."""
        kind = uuid.uuid5(uuid.NAMESPACE_OID, entry.series)
        name = f"{_picture_prefix(entry.series)}{entry.step}+timestamp+{entry.time}+{kind}"
        with tempfile.TemporaryDirectory(prefix="ncsn-") as folder:
            (Path(folder) / f"{name}.png").write_bytes(entry.png)
            small = Image.open(io.BytesIO(entry.png))
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            small.save(Path(folder) / f"{name}+compressed.webp")
            self._client.log_artifacts(self._run_id, folder, "images")
        set_tags(self._client, self._run_id, {"mlflow.loggedImages": "True"})


def _picture_prefix(series: str) -> str:
    return f"{series.replace('/', '~')}+step+"


def log_metrics(client: MlflowClient, run_id: str, entries: Iterable[Entry]) -> None:
    """Record all metrics of these entries, whatever the run has."""
    from mlflow.entities import Metric

    metrics = [Metric(name, value, each.time, each.step) for each in entries for name, value in each.metrics.items()]
    for first in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + BATCH], synchronous=True)


@contextmanager
def request_limits(*, retries: int, seconds: int) -> Iterator[None]:
    """Limit this process's retries and timeouts for MLflow's server, which MLflow reads for each request."""
    limits = {_RETRIES: str(retries), _TIMEOUT: str(seconds)}
    with _environment:
        if not _limits:
            _before.update({name: os.environ.get(name) for name in limits})
        _limits.append(limits)
        os.environ.update(limits)
    try:
        yield
    finally:
        with _environment:
            # Blocks of several threads end in any order. The latest that is still open counts.
            _limits[:] = [each for each in _limits if each is not limits]
            for name, value in (_limits[-1] if _limits else _before).items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
