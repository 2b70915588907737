"""One MLflow run per pipeline run and a child per step, found by their tags.

A retried step continues in the run of its first attempt. Nothing here depends on MLflow's global state: every call
names its run.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ncsn import storage
from ncsn.config import Config, flatten, to_yaml
from ncsn.process import now_ms
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import cost_of, state_after, update_step
from ncsn.tracking.client import (
    Connection,
    TrackingError,
    connect,
    insert_or_find,
    log_params,
    mlflow_errors,
    one_line,
    open_client,
    page,
    set_tags,
    shown,
    tag_filter,
)
from ncsn.tracking.lineage import PARENT, provenance
from ncsn.tracking.live import Entry, LiveMetrics, send, send_missing

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient


TAG_LENGTH = 5000
PARAM_LENGTH = 6000
DIGEST_LENGTH = 36
FIRST_STEP = "ingest"
ADOPTED = "MLFLOW_RUN_ID"  # variable with the run of the whole pipeline, if others have opened it
CURVES = "train"  # the step that has curves and previews
PLACES = ("compute", "storage", "tracking")  # sections of the config that do not change a result
# Sections that a step does not use.
UNUSED_SECTIONS = {
    "ingest": ("search", "select", "sampling", "evaluation"),
    "tune": ("select",),
    "train": ("search", "select", "sampling", "evaluation"),
    "select": ("search",),
}
OUTAGE_SECONDS = 120.0  # how long a step waits for a server that the first one has reached, at its start and end

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRun(Connection):
    """The MLflow run of one step."""

    run_id: str
    parent_run_id: str
    folder: RunFolder

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record results, `area/what` -> number; the step is in images seen, where these are counted."""
        values = {name: float(value) for name, value in metrics.items()}
        send(self.client, self.run_id, [Entry(step, now_ms(), values)])

    def live_metrics(self) -> LiveMetrics:
        """A picklable sender of this run's metrics for a training loop, perhaps in another process."""
        return LiveMetrics(self.uri, self.run_id)

    def log_file(self, uri: str, *, to_parent: bool = False) -> None:
        """Copy a file of the store to the run's artifacts, or to those of the parent."""
        content, name = storage.read_bytes(uri), uri.rpartition("/")[2]
        self.log_bytes(content, name, run_id=self.parent_run_id if to_parent else None)

    def log_bytes(self, content: bytes, name: str, *, run_id: str | None = None) -> None:
        """Record the artifact `name` of this run, unless `run_id` names another."""
        with tempfile.TemporaryDirectory(prefix="ncsn-") as temporary:
            local = Path(temporary) / name
            local.write_bytes(content)
            self.client.log_artifact(run_id or self.run_id, str(local))

    def log_dataset(
        self, name: str, *, digest: str, uri: str, context: str = "training", profile: Mapping[str, int] | None = None
    ) -> None:
        """Record which data the step read, as MLflow's "datasets used" and as tags; `profile` has plain numbers."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:DIGEST_LENGTH],  # the tag has all of it
            source_type="local" if storage.is_local(uri) else "s3",
            source=json.dumps({"uri": uri}),
            profile=json.dumps(profile) if profile else None,
        )
        read = [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
        insert_or_find(lambda: self.client.log_inputs(self.run_id, read))
        for run_id in (self.run_id, self.parent_run_id):
            set_tags(self.client, run_id, {"dataset.digest": digest, "dataset.uri": uri})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        set_tags(self.client, self.run_id, tags)

    def nested(self, name: str, *, key: str, params: Mapping[str, Any]) -> StepRun:
        """The run below this one with this `key`, for example of a trial; a new one if there is none."""
        found = _open(self, {PARENT: self.run_id, "ncsn.key": key}, tags={}, name=name)
        log_params(self.client, found.info.run_id, params)
        return replace(self, run_id=found.info.run_id, parent_run_id=self.run_id)

    def steps_of(self, metric: str) -> set[int]:
        return {entry.step for entry in self.client.get_metric_history(self.run_id, metric)}

    def end(self, status: Literal["FINISHED", "FAILED"]) -> None:
        self.client.set_terminated(self.run_id, status)


@contextmanager
def step_run(config: Config, *, run: str, step: str) -> Iterator[StepRun]:
    """The MLflow run of one step, which ends with the block.

    It is identified by `storage.root`, the name of the pipeline run, the step, and the settings that the step uses. If
    `MLFLOW_RUN_ID` is set, as KFP's MLflow plugin does, that run is the parent, which stays open.
    """
    from mlflow.exceptions import MlflowException

    connection = connect(config, patience=0 if step == FIRST_STEP else OUTAGE_SECONDS)
    client, folder = connection.client, RunFolder(storage.absolute(config.storage.root), run)
    with mlflow_errors(connection.uri):
        parent = _parent(connection, config, folder)
        child = _child(connection, parent, config, folder, step)
        place = client, connection.uri, child.info.experiment_id
        tracked = StepRun(*place, child.info.run_id, parent.info.run_id, folder)
        update_step(folder, step, mlflow={"run_id": tracked.run_id, "parent_run_id": tracked.parent_run_id})
        if step == CURVES:
            send_missing(client, tracked.run_id, folder)  # of an attempt that was killed
    started = time.monotonic()
    try:
        yield tracked
    except BaseException as error:
        _end(tracked, config, step, state_after(error))
        if isinstance(error, MlflowException):
            raise TrackingError(
                shown(connection.uri), one_line(error), hint="repeat the command to continue from here"
            ) from error
        raise
    cost = cost_of(config, step, time.monotonic() - started)
    costs = {f"cost/{name}": value for name, value in cost._asdict().items()}, {f"cost/{step}_seconds": cost.seconds}
    _end(tracked, config, step, "FINISHED", costs, patience=OUTAGE_SECONDS)


def _end(
    tracked: StepRun,
    config: Config,
    step: str,
    status: str,
    costs: Sequence[Mapping[str, float]] = ({}, {}),
    *,
    patience: float = 0.0,
) -> None:
    """Send what the step's run lacks, and end it and, unless others have opened it, the parent."""
    from mlflow.exceptions import MlflowException

    ended = now_ms()
    try:
        client = connect(config, patience=patience).client
        if step == CURVES:
            send_missing(client, tracked.run_id, tracked.folder)
        for run_id, cost in zip((tracked.run_id, tracked.parent_run_id), costs, strict=True):
            # One point per call of the step; its place in the series is the end of the call in seconds since 1970.
            send(client, run_id, [Entry(ended // 1000, ended, cost)])
        for run_id in (tracked.run_id,) if os.environ.get(ADOPTED) else (tracked.run_id, tracked.parent_run_id):
            client.set_terminated(run_id, status, end_time=ended)
    except (MlflowException, TrackingError, OSError) as error:  # the work itself is done, and the run folder has it
        where = shown(tracked.uri)
        _logger.warning("the run of the step %s at %s is not complete: %s", step, where, one_line(error))


def _parent(connection: Connection, config: Config, folder: RunFolder) -> Run:
    """The run of the whole pipeline."""
    from mlflow.exceptions import MlflowException

    client = connection.client
    if adopted := os.environ.get(ADOPTED):
        try:
            found = client.get_run(adopted)
        except MlflowException as error:
            where = shown(connection.uri)
            raise TrackingError(ADOPTED, f"{one_line(error)} (at {where})", value=adopted) from error
        set_tags(client, adopted, _identity(folder))
        return found
    identity = {**_identity(folder), "ncsn.part": "run"}
    parent = _open(connection, identity, tags=provenance("ncsn run"), name=folder.run)
    _describe(client, parent, config)
    return parent


def _child(connection: Connection, parent: Run, config: Config, folder: RunFolder, step: str) -> Run:
    connection = replace(connection, experiment_id=parent.info.experiment_id)
    # A digest of what can change a result: other settings are another run, another machine is not.
    unused = {*PLACES, *UNUSED_SECTIONS.get(step, ("search", "select"))}
    digest = storage.digest(config.model_dump(mode="json", exclude=unused), 16)
    identity = {**_identity(folder), "ncsn.step": step, "ncsn.config": digest}
    tags = {PARENT: parent.info.run_id, **provenance(f"ncsn {step}")}
    child = _open(connection, identity, tags=tags, name=step)
    _describe(connection.client, child, config)
    return child


def _identity(folder: RunFolder) -> dict[str, str]:
    """The tags that all MLflow runs of a pipeline run share."""
    return {"ncsn.run": folder.run, "ncsn.root": folder.root}


def _open(connection: Connection, identity: Mapping[str, str], *, tags: Mapping[str, str], name: str) -> Run:
    """The first run with the tags `identity`, set to running, or a new one."""
    client = connection.client
    found = search_runs(client, connection.experiment_id, identity)
    if not found:
        return client.create_run(connection.experiment_id, run_name=name, tags={**identity, **tags})
    set_tags(client, found[0].info.run_id, tags)
    client.update_run(found[0].info.run_id, status="RUNNING")
    return found[0]


def search_runs(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> list[Run]:
    """The runs with these tags, the latest last."""
    return list(client.search_runs([experiment_id], tag_filter(tags), order_by=["attributes.start_time ASC"]))


def _describe(client: MlflowClient, run: Run, config: Config) -> None:
    """Record YAML and parameters of the config, unless an earlier attempt has; what differs then is a tag."""
    params = {path: str(value)[:PARAM_LENGTH] for path, value in flatten(config).items()}
    known = run.data.params
    if not known:
        client.log_text(run.info.run_id, to_yaml(config), "config.yaml")
    log_params(client, run.info.run_id, {path: value for path, value in params.items() if path not in known})
    changed = [f"{path}: {known[path]} -> {value}" for path, value in params.items() if known.get(path, value) != value]
    if changed:
        set_tags(client, run.info.run_id, {"ncsn.changed": "; ".join(changed)[:TAG_LENGTH]})


@dataclass(frozen=True)
class RecordedRun:
    """One run in MLflow."""

    run_id: str
    tags: Mapping[str, str]
    place: str  # the address of its page; the tracking URI if the runs are not on a server


def recorded_runs(client: MlflowClient, uri: str, parent: Run) -> tuple[RecordedRun, dict[str, RecordedRun]]:
    """The run of a whole pipeline, and the latest run of each step."""

    def recorded(run: Run) -> RecordedRun:
        place = page(uri, run.info.experiment_id, run.info.run_id) or shown(uri)
        return RecordedRun(run.info.run_id, dict(run.data.tags), place)

    steps = search_runs(client, parent.info.experiment_id, {PARENT: parent.info.run_id})
    return recorded(parent), {
        run.data.tags["ncsn.step"]: recorded(run) for run in steps if "ncsn.step" in run.data.tags
    }


def close_run(
    config: Config, *, run: str, status: str, tags: Mapping[str, str]
) -> tuple[RecordedRun, dict[str, RecordedRun]] | None:
    """Give the run, and steps that ended without reporting, a status of MLflow; the run and its steps.

    None if MLflow has no such run. A run that others have opened, for example KFP's MLflow plugin, stays open.
    """
    client, uri = open_client(config)
    folder = RunFolder(storage.absolute(config.storage.root), run)
    with mlflow_errors(uri):
        if adopted := os.environ.get(ADOPTED):
            parent = client.get_run(adopted)
        else:
            experiment = client.get_experiment_by_name(config.tracking.experiment)
            identity = {**_identity(folder), "ncsn.part": "run"}
            found = search_runs(client, experiment.experiment_id, identity) if experiment else []
            if not found:
                return None
            parent = found[0]
        set_tags(client, parent.info.run_id, tags)
        for step in search_runs(client, parent.info.experiment_id, {PARENT: parent.info.run_id}):
            if step.info.status == "RUNNING":
                if step.data.tags.get("ncsn.step") == CURVES:
                    send_missing(client, step.info.run_id, folder)
                client.set_terminated(step.info.run_id, "KILLED" if status == "FINISHED" else status)
        if not adopted:
            client.set_terminated(parent.info.run_id, status)
        return recorded_runs(client, uri, parent)
