"""Metrics and pictures to MLflow: while training runs, and what is missing afterwards.

The run folder is the record and MLflow a view of it. Sending again is harmless: a point keeps its time, and MLflow
stores equal points once.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ncsn import storage
from ncsn.errors import without_users
from ncsn.runs.history import PREVIEW, load_history
from ncsn.runs.layout import RunFolder
from ncsn.tracking.client import client_at, one_line

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SEND_EVERY = 2.0  # seconds between requests, so that the metrics of several steps share one
MARK = "train/learning_rate"  # a metric of every point, sent last: a run that has it at a step has the whole point

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One point of the curves, or one picture."""

    step: int  # images seen
    time: int  # milliseconds since 1970
    metrics: Mapping[str, float]
    png: bytes = b""


class LiveMetrics:
    """Sends metrics and pictures of one MLflow run from a thread. `log` neither blocks nor raises.

    What the server does not take is left to `send_missing`. Picklable: a copy in another process has nothing to send.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._waiting: list[Point] = []
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type[LiveMetrics], tuple[str, str]]:
        return type(self), (self.uri, self.run_id)

    def log(self, metrics: Mapping[str, float], images_seen: int, when: int, *, png: bytes = b"") -> None:
        """Take the metrics of one moment, in milliseconds since 1970, or one preview of a series."""
        with self._lock:
            self._waiting.append(Point(images_seen, when, metrics, png))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow-metrics", daemon=True)
            self._thread.start()

    def close(self, *, seconds: float = 30.0) -> None:
        """Send the remaining entries, for at most `seconds`."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        client, known, last, away = None, set[int](), False, False
        while not last:
            last = self._closing.wait(SEND_EVERY)
            with self._lock:
                entries, self._waiting = self._waiting, []
            if not entries:
                continue
            try:
                if client is None:
                    server = client_at(self.uri)
                    # An attempt that was killed came further than the checkpoint from which this one repeats its steps.
                    known = {metric.step for metric in server.get_metric_history(self.run_id, MARK)}
                    client = server
                send(client, self.run_id, [entry for entry in entries if entry.png or entry.step not in known])
                away = False
            except Exception as error:  # noqa: BLE001  (whatever the server does, training goes on)
                if not away:  # not every two seconds of an outage
                    _logger.warning(
                        "%s lacks metrics until the step ends: %s", without_users(self.uri), one_line(error)
                    )
                away = True


def send(client: MlflowClient, run_id: str, entries: Sequence[Point]) -> None:
    """Record the metrics and pictures of these entries."""
    from mlflow.entities import Metric

    metrics = [
        Metric(name, value, entry.time, entry.step)
        for entry in entries
        for name, value in sorted(entry.metrics.items(), key=lambda metric: metric[0] == MARK)
    ]
    client.log_batch(run_id, metrics=metrics)
    for entry in entries:
        if entry.png:
            picture = Image.open(io.BytesIO(entry.png))
            client.log_image(run_id, picture, key=PREVIEW, step=entry.step, timestamp=entry.time)


def send_missing(client: MlflowClient, run_id: str, folder: RunFolder) -> None:
    """Send the points and previews in the run folder that the MLflow run of its training lacks."""
    history = load_history(folder.history)
    points = list(zip(history.images_seen, history.times, history.system, history.points, strict=True))
    if not points:
        return
    known = {metric.step for metric in client.get_metric_history(run_id, MARK)}
    send(client, run_id, [Point(seen, when, load | point) for seen, when, load, point in points if seen not in known])
    # MLflow sends the small copy of a picture last, and names it train~preview+step+64+...+compressed.webp.
    names = [Path(file.path).name for file in client.list_artifacts(run_id, "images")]
    sent = {int(name.split("+")[2]) for name in names if name.endswith(".webp")}
    kept = set(storage.list_names(folder.previews))
    for seen, when, *_ in points:
        uri = folder.preview(seen)
        if seen not in sent and uri.rpartition("/")[2] in kept:
            send(client, run_id, [Point(seen, when, {}, storage.read_bytes(uri))])
