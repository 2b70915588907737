"""How a pipeline run ended, written to its MLflow run, and what its steps noted there."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ncsn import storage
from ncsn.config import Config
from ncsn.runs.folder import RunFolder
from ncsn.tracking.client import TrackingError, one_line, open_client, page, set_tags, shown, tag_filter
from ncsn.tracking.reconcile import reconcile

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

STATUSES = ("FINISHED", "FAILED", "KILLED")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedRun:
    """What MLflow knows of a pipeline run.

    Attributes:
        run_id: Its MLflow run, the parent of those of the steps.
        place: The address of its page, or the tracking URI where there is no page.
        tags: Step -> tags of its run.
    """

    run_id: str
    place: str
    tags: Mapping[str, Mapping[str, str]]


def close_run(config: Config, *, run: str, status: str, tags: Mapping[str, str]) -> TrackedRun | None:
    """Give the run, and steps that died without a word, the status; None if MLflow has no such run.

    A run that somebody else opened, as KFP's MLflow plugin does, is left for them to close.

    Args:
        config: The experiment.
        run: Name of the run.
        status: One of `STATUSES`.
        tags: For the run as a whole.

    Raises:
        TrackingError: if the tracking server cannot be used.
    """
    from mlflow.exceptions import MlflowException

    assert status in STATUSES
    client, uri = open_client(config)
    try:
        parent = _parent(client, config, run)
        if parent is None:
            return None
        set_tags(client, parent.info.run_id, tags)
        if reason := reconcile(client, RunFolder(storage.absolute(config.storage.root), run)):
            _logger.warning("MLflow still lacks metrics of the run %s: %s", run, reason)
        steps = _search(client, parent.info.experiment_id, {"mlflow.parentRunId": parent.info.run_id})
        dead = [step for step in steps if step.info.status == "RUNNING"]
        for each in dead if os.environ.get("MLFLOW_RUN_ID") else [*dead, parent]:
            client.set_terminated(each.info.run_id, "KILLED" if each in dead and status == "FINISHED" else status)
    except MlflowException as error:
        raise TrackingError(shown(uri), one_line(error)) from error
    noted = {step.data.tags["ncsn.step"]: step.data.tags for step in reversed(steps) if "ncsn.step" in step.data.tags}
    place = page(uri, parent.info.experiment_id, parent.info.run_id) or shown(uri)
    return TrackedRun(parent.info.run_id, place, noted)


def _parent(client: MlflowClient, config: Config, run: str) -> Run | None:
    if adopted := os.environ.get("MLFLOW_RUN_ID"):
        return client.get_run(adopted)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        return None
    identity = {"ncsn.run": run, "ncsn.root": storage.absolute(config.storage.root), "ncsn.part": "run"}
    return next(iter(_search(client, experiment.experiment_id, identity)), None)


def _search(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> list[Run]:
    """The runs with these tags, the latest first."""
    return list(client.search_runs([experiment_id], tag_filter(tags), order_by=["attributes.start_time DESC"]))
