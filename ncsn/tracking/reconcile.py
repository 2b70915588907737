"""Sends MLflow what it lacks from a run folder.

What a killed process had not sent is either before its last checkpoint, and in the run folder, or after it, and is
trained again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ncsn import storage
from ncsn.runs.curves import PREVIEW
from ncsn.runs.folder import RunFolder
from ncsn.runs.history import load_history
from ncsn.runs.records import read_step, update_step
from ncsn.tracking.client import Ignoring, one_line
from ncsn.tracking.live import PERMANENT, Entry, Sender, log_metrics

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

CURVES = "train"  # the step that has curves and previews

_logger = logging.getLogger(__name__)


def reconcile(client: MlflowClient, folder: RunFolder, *, parent: bool = False) -> str:
    """Send what the steps' MLflow runs lack of what the run folder has: points, previews, the end and the cost.

    With `parent`, the run of the whole pipeline ends with a step whose end is sent. Returns why something cannot be
    sent now; empty if MLflow has everything.
    """
    from mlflow.exceptions import MlflowException

    try:
        for step, record in _records(folder):
            run = None if record.get("sent") else _find(client, record["run_id"])
            if run is None:
                continue
            if _is_open(run):  # a run that has ended lacks nothing, because its end is sent last
                ends = parent and (whole := _find(client, record["parent_run_id"])) is not None and _is_open(whole)
                send_missing(client, folder, step, record, parent=ends)
            mark_sent(folder, step, record)
    except (MlflowException, OSError) as error:
        return one_line(error)
    return ""


def lacks_ends(folder: RunFolder) -> bool:
    """Whether MLflow has not acknowledged the end of some step; reads the run folder only."""
    return any("status" in record and not record.get("sent") for _, record in _records(folder))


def _records(folder: RunFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    for step in storage.list_names(folder.steps):
        if record := read_step(folder, step).mlflow:
            yield step, dict(record)


def _find(client: MlflowClient, run_id: str) -> Run | None:
    """The run, or None if the step was recorded on another server."""
    with Ignoring(*PERMANENT):
        return client.get_run(run_id)
    return None


def _is_open(run: Run) -> bool:
    return bool(run.info.status == "RUNNING" and run.info.lifecycle_stage == "active")


def send_missing(
    client: MlflowClient, folder: RunFolder, step: str, record: Mapping[str, Any], *, parent: bool = False
) -> None:
    """`reconcile` for one step, of which `record` is what `step.json` says of it; with `parent` ends that run too.

    Raises:
        MlflowException: The server does not take it now.
        OSError: It does not take a picture, or the store cannot be read.
    """
    run_id, status = record["run_id"], record.get("status", "")
    if step == CURVES:
        try:
            with _ignoring_permanent(run_id):
                _send_curves(client, run_id, folder)
        except OSError as error:
            if status not in ("FAILED", "KILLED"):  # such a step may have ended because of the store
                raise
            _logger.warning("the curves of the MLflow run %s are not complete: %s", run_id, error)
    if not status:
        return
    ended = record["ended"]
    for each, costs in ((record["parent_run_id"], record["run_cost"]), (run_id, record["cost"])):
        with _ignoring_permanent(each):
            # One point per call of the step; its place in the series is the end of the call in seconds since 1970.
            log_metrics(client, each, [Entry("cost", ended // 1000, ended, costs)])
    for each in (record["parent_run_id"], run_id) if parent else (run_id,):
        with _ignoring_permanent(each):
            client.set_terminated(each, status, end_time=ended)


def write_record(folder: RunFolder, step: str, record: Mapping[str, Any]) -> None:
    """Record which MLflow run the step has and, when it has ended, how and at what cost."""
    update_step(folder, step, mlflow=record)


def mark_sent(folder: RunFolder, step: str, record: Mapping[str, Any]) -> None:
    """Record that MLflow has the end of the step, so that no later command checks again."""
    if "status" in record:
        with suppress(OSError):  # then a later command checks again
            write_record(folder, step, {**record, "sent": True})


def _send_curves(client: MlflowClient, run_id: str, folder: RunFolder) -> None:
    history, sender = load_history(folder.history), Sender(client, run_id)
    points = list(zip(history.images_seen, history.times, history.system, history.points, strict=True))
    sender.send(Entry(next(reversed(point)), seen, when, system | point) for seen, when, system, point in points)
    kept = set(storage.list_names(folder.previews))
    for seen, when, _, _ in points:
        picture = folder.preview(seen)
        if picture.rpartition("/")[2] in kept and not sender.has(PREVIEW, seen, picture=True):
            sender.send([Entry(PREVIEW, seen, when, png=storage.read_bytes(picture))])


@contextmanager
def _ignoring_permanent(run_id: str) -> Iterator[None]:
    """Only warn about a run that is gone, so that the others are completed."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in PERMANENT:
            raise
        _logger.warning("the MLflow run %s is not complete: %s", run_id, one_line(error))
