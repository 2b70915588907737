"""Brings a journal to the tracking server: in order, each entry once, whatever was sent before and by whom."""

from __future__ import annotations

import base64
import io
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ncsn.tracking.client import one_line, set_tags
from ncsn.tracking.journal import Entry, Journal, JournalInUseError, held, runs_with_journal

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

BATCH = 1000
"""Metrics per request: MLflow's limit."""
THUMBNAIL = 256
"""Side of the small copy of a picture that MLflow's page shows in a series."""
HOPELESS = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"})
"""Answers that waiting does not change, such as that of a deleted run."""
RETRIES, TIMEOUT = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"

_logger = logging.getLogger(__name__)
_environment = threading.Lock()


@contextmanager
def patience(*, retries: int, timeout: int) -> Iterator[None]:
    """How often and how long MLflow tries in this process meanwhile; it reads both from the environment."""
    with _environment:
        before = {name: os.environ.get(name) for name in (RETRIES, TIMEOUT)}
        os.environ.update({RETRIES: str(retries), TIMEOUT: str(timeout)})
    try:
        yield
    finally:
        with _environment:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class Delivery:
    """Sends the journal of one run.

    What a resumed run repeats after another process has recorded it, perhaps on another node, is left out: of each
    series the server is asked once how far it has it.
    """

    def __init__(self, client: MlflowClient, run_id: str, journal: Journal) -> None:
        self._client, self._run_id, self._journal = client, run_id, journal
        self._known: dict[str, int] = {}
        self.lost = 0
        self.reason = ""

    def send_batch(self) -> tuple[list[tuple[Entry, int]], int]:
        """Send the oldest entries; what they were, to be acknowledged, and how many metrics or pictures were sent.

        Raises:
            MlflowException: if the server does not take them now.
        """
        from mlflow.exceptions import MlflowException

        batch = self._journal.oldest(BATCH)
        try:
            new = [entry for entry, _ in batch if entry.step > self._known_step(entry)]
            _send_metrics(self._client, self._run_id, new)
            for entry in new:
                if not entry.metrics:
                    tell(self._client, self._run_id, entry)
        except MlflowException as error:
            if error.error_code not in HOPELESS:
                raise
            self.lost += sum(entry.count for entry, _ in batch)
            self.reason = one_line(error)
            return batch, 0
        return batch, sum(entry.count for entry in new)

    def _known_step(self, entry: Entry) -> int:
        """The step up to which the server has the entry's series; -1 for none."""
        if entry.series not in self._known:
            if entry.metrics:
                history = self._client.get_metric_history(self._run_id, next(reversed(entry.metrics)))
                steps = [metric.step for metric in history]
            elif entry.png:
                files = [Path(file.path).name for file in self._client.list_artifacts(self._run_id, "images")]
                prefix, complete = entry.series.replace("/", "~") + "+step+", "+compressed.webp"
                names = [name for name in files if name.startswith(prefix) and name.endswith(complete)]
                steps = [int(name.removeprefix(prefix).partition("+")[0]) for name in names]
            else:
                steps = []
            self._known[entry.series] = max(steps, default=-1)
        return self._known[entry.series]


def send_leftovers(client: MlflowClient, folder: str, *, seconds: float = 60.0) -> None:
    """Send what earlier steps of a pipeline run left unsent in `folder`; what cannot be sent now stays there."""
    from mlflow.exceptions import MlflowException

    give_up = time.monotonic() + seconds
    for run_id in runs_with_journal(folder):
        try:
            with held(folder, run_id) as journal:
                delivery = Delivery(client, run_id, journal)
                while journal.unsent and time.monotonic() < give_up:
                    batch, _ = delivery.send_batch()
                    journal.acknowledge(batch)
                if delivery.lost:
                    _logger.warning("%d metrics of the MLflow run %s: %s", delivery.lost, run_id, delivery.reason)
        except JournalInUseError:  # by a training that sends them itself
            continue
        except MlflowException as error:
            _logger.warning("metrics of the MLflow run %s stay in %s: %s", run_id, folder, one_line(error))


def tell(client: MlflowClient, run_id: str, entry: Entry) -> None:
    """Record one entry.

    Raises:
        MlflowException: if the server does not take it.
    """
    if entry.png:
        _send_picture(client, run_id, entry)
    elif entry.status:
        client.set_terminated(run_id, entry.status, end_time=entry.time)
    else:
        _send_metrics(client, run_id, [entry])


def _send_metrics(client: MlflowClient, run_id: str, entries: list[Entry]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(name, value, entry.time, entry.step) for entry in entries for name, value in entry.metrics.items()
    ]
    for first in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + BATCH], synchronous=True)


def _send_picture(client: MlflowClient, run_id: str, entry: Entry) -> None:
    """As `MlflowClient.log_image`, but under a name that sending again does not change."""
    png = base64.b64decode(entry.png)
    name = f"{_picture_prefix(entry)}timestamp+{entry.time}+{uuid.uuid5(uuid.NAMESPACE_OID, entry.series)}"
    with tempfile.TemporaryDirectory(prefix="ncsn-") as folder:
        (Path(folder) / f"{name}.png").write_bytes(png)
        small = Image.open(io.BytesIO(png))
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(Path(folder) / f"{name}+compressed.webp")
        client.log_artifacts(run_id, folder, "images")
    set_tags(client, run_id, {"mlflow.loggedImages": "True"})


def _picture_prefix(entry: Entry) -> str:
    return f"{entry.series.replace('/', '~')}+step+{entry.step}+"
