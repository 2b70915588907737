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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ncsn import storage
from ncsn.config import Config, flatten, to_yaml
from ncsn.process import now_ms
from ncsn.runs.costs import cost_of
from ncsn.runs.folder import RunFolder
from ncsn.storage.retry import limited
from ncsn.tracking.client import (
    PARAM_LENGTH,
    Connection,
    TrackingError,
    connect,
    insert_or_find,
    log_params,
    one_line,
    open_client,
    set_tags,
    shown,
)
from ncsn.tracking.lineage import kfp_run, provenance
from ncsn.tracking.live import Entry, LiveMetrics, log_metrics, request_limits
from ncsn.tracking.reconcile import lacks_ends, mark_sent, reconcile, send_missing, write_record
from ncsn.tracking.recorded import RecordedRun, by_step, find_or_create, run_identity, search_runs

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient


TAG_LENGTH = 5000
DIGEST_LENGTH = 36
FIRST_STEP = "ingest"
PLACES = ("compute", "storage", "tracking")  # sections of the config that do not change a result
# Sections that a step does not use.
UNUSED_SECTIONS = {
    "ingest": ("search", "select", "sampling", "evaluation"),
    "tune": ("select",),
    "train": ("search", "select", "sampling", "evaluation"),
    "select": ("search",),
}
OUTAGE_SECONDS = 60.0  # how long later steps wait for a server that the first one has reached
# Retries, and seconds for each, at the end of a step, before the rest is left to the next command.
RETRIES, TIMEOUT = 2, 10

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRun(Connection):
    """The MLflow run of one step."""

    run_id: str
    parent_run_id: str
    folder: RunFolder

    @property
    def run_ids(self) -> dict[str, str]:
        """What `step.json` says of a step that runs."""
        return {"run_id": self.run_id, "parent_run_id": self.parent_run_id}

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings that the run does not have yet; MLflow's parameters do not change."""
        log_params(self.client, self.run_id, params)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record results, `area/what` -> number; the step is in images seen, where these are counted."""
        values = {name: float(value) for name, value in metrics.items()}
        log_metrics(self.client, self.run_id, [Entry("", step, now_ms(), values)])

    def live_metrics(self) -> LiveMetrics:
        """A picklable sender of this run's metrics for a training loop, perhaps in another process."""
        return LiveMetrics(self.uri, self.run_id)

    def send_rest(self) -> str:
        """Send what MLflow lacks so far; a note for people if the server is unreachable, else empty."""
        with request_limits(retries=RETRIES, seconds=TIMEOUT):
            reason = reconcile(self.client, self.folder)
        if not reason:
            return ""
        return (
            f"the tracking server {shown(self.uri)} lacks metrics of this run ({reason}); the next command of the run "
            f"sends them from {self.folder.uri}"
        )

    def log_file(self, uri: str, folder: str | None = None, *, to_parent: bool = False) -> None:
        """Copy a file of the store to the run's artifacts, or to those of the parent, below `folder`."""
        run_id = self.parent_run_id if to_parent else self.run_id
        if storage.is_local(uri):
            self.client.log_artifact(run_id, uri, folder)
        else:
            self.log_bytes(storage.read_bytes(uri), uri.rsplit("/", 1)[-1], run_id=run_id, folder=folder)

    def log_bytes(self, content: bytes, name: str, *, run_id: str | None = None, folder: str | None = None) -> None:
        """Record the artifact `name`, below `folder`; of this run, unless `run_id` names another."""
        with tempfile.TemporaryDirectory(prefix="ncsn-") as temporary:
            local = Path(temporary) / name
            local.write_bytes(content)
            self.client.log_artifact(run_id or self.run_id, str(local), folder)

    def log_text(self, text: str, name: str) -> None:
        """Record the artifact `name`."""
        self.client.log_text(self.run_id, text, name)

    def log_json(self, value: Mapping[str, Any], name: str) -> None:
        """Record the artifact `name`."""
        self.log_text(json.dumps(value, indent=1), name)

    def log_dataset(
        self, name: str, *, digest: str, uri: str, context: str = "training", profile: Mapping[str, Any] | None = None
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
        """Set tags."""
        set_tags(self.client, self.run_id, tags)

    def nested(self, name: str, *, key: str) -> StepRun:
        """The run below this one with this `key`, for example of a trial; a new one if there is none."""
        identity = {"mlflow.parentRunId": self.run_id, "ncsn.key": key}
        found = find_or_create(self, self.folder, identity, tags={}, name=name)
        return replace(self, run_id=found.info.run_id, parent_run_id=self.run_id)

    def steps_of(self, metric: str) -> set[int]:
        """The steps at which the run has the metric."""
        return {entry.step for entry in self.client.get_metric_history(self.run_id, metric)}

    def end(self, status: Literal["FINISHED", "FAILED"]) -> None:
        """Close a nested run."""
        self.client.set_terminated(self.run_id, status)


@contextmanager
def step_run(config: Config, *, run: str, step: str) -> Iterator[StepRun]:
    """The MLflow run of one step, which ends with the block.

    It is identified by `storage.root`, the name of the pipeline run, the step, and the settings that the step uses. If
    `MLFLOW_RUN_ID` is set, as KFP's MLflow plugin does, that run is the parent. What MLflow lacks of earlier steps is
    sent first.
    """
    from mlflow.exceptions import MlflowException

    connection = connect(config, patience=0 if step == FIRST_STEP else OUTAGE_SECONDS)
    folder = RunFolder(storage.absolute(config.storage.root), run)
    if reason := reconcile(connection.client, folder):
        _logger.warning("MLflow still lacks metrics of the run %s: %s", run, reason)
    parent, adopted = _parent(connection, config, folder)
    child = _child(connection, parent, config, folder, step)
    place = connection.client, connection.uri, child.info.experiment_id
    tracked = StepRun(*place, child.info.run_id, parent.info.run_id, folder)
    write_record(folder, step, tracked.run_ids)
    send_missing(tracked.client, folder, step, tracked.run_ids)
    started = time.monotonic()
    try:
        yield tracked
    except BaseException as error:
        with limited(TIMEOUT):
            _end(tracked, step, "FAILED" if isinstance(error, Exception) else "KILLED", adopted=adopted)
        if isinstance(error, MlflowException):
            raise TrackingError(
                shown(connection.uri), one_line(error), hint="repeat the command to continue from here"
            ) from error
        raise
    cost = cost_of(config, step, time.monotonic() - started)
    costs = {f"cost/{name}": value for name, value in asdict(cost).items()}, {f"cost/{step}_seconds": cost.seconds}
    _end(tracked, step, "FINISHED", costs, adopted=adopted)


def _end(
    tracked: StepRun, step: str, status: str, costs: Sequence[Mapping[str, float]] = ({}, {}), *, adopted: bool
) -> None:
    """End the step's run and, unless it was adopted, the parent."""
    from mlflow.exceptions import MlflowException

    cost, run_cost = costs
    record = {**tracked.run_ids, "status": status, "ended": now_ms(), "cost": cost, "run_cost": run_cost}
    try:
        with suppress(OSError):  # a full disk or an unreachable store
            write_record(tracked.folder, step, record)
        with request_limits(retries=RETRIES, seconds=TIMEOUT):
            send_missing(tracked.client, tracked.folder, step, record, parent=not adopted)
        mark_sent(tracked.folder, step, record)
    except (MlflowException, OSError) as error:  # the work itself is done: the next command of the run sends the rest
        _logger.warning("the MLflow run of the step %s is not complete: %s", step, one_line(error))


def send_ends(config: Config, folder: RunFolder) -> None:
    """Send the ends of steps that MLflow did not take when they ended, for a run that has no step left to do."""
    if not lacks_ends(folder):  # then MLflow is not even loaded
        return
    try:
        with request_limits(retries=RETRIES, seconds=TIMEOUT):
            client, _ = open_client(config)
            reason = reconcile(client, folder, parent="MLFLOW_RUN_ID" not in os.environ)
    except Exception as error:  # noqa: BLE001 - the run is complete, whatever MLflow or its database does
        reason = one_line(error)
    if reason:
        _logger.warning("MLflow may lack the end of the run %s: %s", folder.run, reason)


def _parent(connection: Connection, config: Config, folder: RunFolder) -> tuple[Run, bool]:
    """The run of the whole pipeline, and whether it was opened by others and adopted."""
    from mlflow.exceptions import MlflowException

    client, identity = connection.client, run_identity(folder)
    if adopted := os.environ.get("MLFLOW_RUN_ID"):
        try:
            found = client.get_run(adopted)
        except MlflowException as error:
            raise TrackingError(
                "MLFLOW_RUN_ID", f"{one_line(error)} (at {shown(connection.uri)})", value=adopted
            ) from error
        set_tags(client, adopted, identity)
        return found, True
    identity |= {"ncsn.part": "run"}
    parent = find_or_create(connection, folder, identity, tags=provenance("ncsn run"), name=folder.run)
    _describe(client, parent, config)
    return parent, False


def _child(connection: Connection, parent: Run, config: Config, folder: RunFolder, step: str) -> Run:
    connection = replace(connection, experiment_id=parent.info.experiment_id)
    identity = run_identity(folder) | {"ncsn.step": step, "ncsn.config": _result_digest(config, step)}
    tags = {"mlflow.parentRunId": parent.info.run_id, **provenance(f"ncsn {step}")}
    child = find_or_create(connection, folder, identity, tags=tags, name=step)
    _describe(connection.client, child, config)
    return child


def _result_digest(config: Config, step: str) -> str:
    """Digest of what can change a result: other settings are another run, another machine is not."""
    sections = config.model_dump(mode="json", exclude={*PLACES, *UNUSED_SECTIONS.get(step, ("search", "select"))})
    return storage.digest(sections, 16)


def _describe(client: MlflowClient, run: Run, config: Config) -> None:
    """Record YAML and parameters of the config, unless an earlier attempt has; what differs then is a tag."""
    params = {path: str(value)[:PARAM_LENGTH] for path, value in flatten(config).items()}
    known = run.data.params
    if params.keys() - known.keys():
        if not known:
            client.log_text(run.info.run_id, to_yaml(config), "config.yaml")
        log_params(client, run.info.run_id, params)
    changed = [f"{path}: {known[path]} -> {value}" for path, value in params.items() if known.get(path, value) != value]
    if changed:
        set_tags(client, run.info.run_id, {"ncsn.changed": "; ".join(changed)[:TAG_LENGTH]})


def whole_run(tracked: StepRun) -> RecordedRun:
    """The run of the whole pipeline that a step belongs to."""
    return RecordedRun.of(tracked.client.get_run(tracked.parent_run_id), uri=tracked.uri)


def step_runs(tracked: StepRun) -> dict[str, RecordedRun]:
    """Step -> its latest run, of the pipeline run that `tracked` belongs to."""
    found = search_runs(tracked.client, tracked.experiment_id, {"mlflow.parentRunId": tracked.parent_run_id})
    return by_step(found, uri=tracked.uri)


def job_metadata(tracked: StepRun, *, run: str, step: str) -> dict[str, str]:
    """What Ray's pages show of a Ray job: its step, and its runs in MLflow and KFP."""
    recorded = RecordedRun.of(tracked.client.get_run(tracked.run_id), uri=tracked.uri)
    names = {"ncsn.run": run, "ncsn.step": step, "mlflow.run_id": tracked.run_id}
    return names | {"mlflow.run": recorded.place} | kfp_run()
