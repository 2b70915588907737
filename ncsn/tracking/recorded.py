"""The MLflow runs of a pipeline run: found by their tags or created, read back, closed."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ncsn import storage
from ncsn.config import Config
from ncsn.runs.folder import RunFolder
from ncsn.tracking.client import Connection, mlflow_errors, open_client, page, set_tags, shown, tag_filter
from ncsn.tracking.reconcile import reconcile

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedRun:
    """One run in MLflow."""

    run_id: str
    tags: Mapping[str, str]
    page: str  # its address; empty if the runs are not on a server
    place: str  # the same, or else the tracking URI

    @classmethod
    def of(cls, run: Run, *, uri: str) -> RecordedRun:
        """The run as the server at `uri` gave it."""
        address = page(uri, run.info.experiment_id, run.info.run_id)
        return cls(run.info.run_id, dict(run.data.tags), address, address or shown(uri))


def run_identity(folder: RunFolder) -> dict[str, str]:
    """The tags that all MLflow runs of a pipeline run share."""
    return {"ncsn.run": folder.run, "ncsn.root": folder.root}


def find_or_create(
    connection: Connection, folder: RunFolder, identity: Mapping[str, str], *, tags: Mapping[str, str], name: str
) -> Run:
    """The run with the tags `identity`, set to running, or a new one.

    MLflow has no condition on creating a run, so the store decides between two processes that create one at once.
    """
    client, query = connection.client, tag_filter(identity)
    found = _first(connection, query)
    run = found or client.create_run(connection.experiment_id, run_name=name, tags={**identity, **tags})
    first = _first_claimed(connection, query, run, folder.tracking)
    if first is not None and found is None:
        client.delete_run(run.info.run_id)
    if known := first or found:
        set_tags(client, known.info.run_id, {**identity, **tags})
        client.update_run(known.info.run_id, status="RUNNING")
    return known or run


def _first_claimed(connection: Connection, query: str, run: Run, claims: str) -> Run | None:
    """The run that another process has claimed for this query; None if it is `run`, which then is claimed."""
    # A run that was found is claimed too: its process may not have claimed it yet, and would delete it if it lost.
    run_id = run.info.run_id
    claim = storage.join(claims, hashlib.sha256(f"{connection.uri} {query}".encode()).hexdigest()[:16])
    if storage.publish_once(claim, run_id.encode()) or (claimed := storage.read_text(claim)) == run_id:
        return None
    first = _first(connection, f"{query} and attributes.run_id = '{claimed}'")
    if first is None:
        storage.write_text(claim, run_id)  # it was deleted meanwhile
    return first


def _first(connection: Connection, query: str) -> Run | None:
    order = ["attributes.start_time ASC"]
    found = connection.client.search_runs([connection.experiment_id], query, max_results=1, order_by=order)
    return found[0] if found else None


def close_run(
    config: Config, *, run: str, status: str, tags: Mapping[str, str]
) -> tuple[RecordedRun, dict[str, RecordedRun]] | None:
    """Give the run, and steps that ended without reporting, a status of MLflow; the run and its steps.

    None if MLflow has no such run. An adopted run, for example of KFP's MLflow plugin, stays open.
    """
    client, uri = open_client(config)
    folder = RunFolder(storage.absolute(config.storage.root), run)
    with mlflow_errors(uri):
        parent = _parent(client, config.tracking.experiment, folder)
        if parent is None:
            return None
        set_tags(client, parent.info.run_id, tags)
        if reason := reconcile(client, folder):
            _logger.warning("MLflow still lacks metrics of the run %s: %s", run, reason)
        steps = search_runs(client, parent.info.experiment_id, {"mlflow.parentRunId": parent.info.run_id})
        dead = [step for step in steps if step.info.status == "RUNNING"]
        for each in dead if os.environ.get("MLFLOW_RUN_ID") else [*dead, parent]:
            client.set_terminated(each.info.run_id, "KILLED" if each in dead and status == "FINISHED" else status)
    return RecordedRun.of(parent, uri=uri), by_step(steps, uri=uri)


def _parent(client: MlflowClient, experiment_name: str, folder: RunFolder) -> Run | None:
    if adopted := os.environ.get("MLFLOW_RUN_ID"):
        return client.get_run(adopted)
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        return None
    found = search_runs(client, experiment.experiment_id, {**run_identity(folder), "ncsn.part": "run"})
    return found[-1] if found else None


def search_runs(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> list[Run]:
    """The runs with these tags, the latest last."""
    return list(client.search_runs([experiment_id], tag_filter(tags), order_by=["attributes.start_time ASC"]))


def by_step(runs: list[Run], *, uri: str) -> dict[str, RecordedRun]:
    """Step -> the last of its runs."""
    return {run.data.tags["ncsn.step"]: RecordedRun.of(run, uri=uri) for run in runs if "ncsn.step" in run.data.tags}
