"""One MLflow run per pipeline run and a child per step, found by their tags.

A retried step finds the run of its first try and goes on there. Nothing here depends on MLflow's global state: every
call names the run that it means.
"""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ncsn import storage
from ncsn.config import Config, flatten, to_yaml
from ncsn.tracking.connection import Connection, TrackingError, connect, one_line, shown
from ncsn.tracking.sink import MetricsSink

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

PARAM_LENGTH = 6000
DIGEST_LENGTH = 36
BATCH = 100
"""Parameters, or tags, per request: MLflow's limit."""
PLACES = ("compute", "storage", "tracking")
"""Sections of the config that say where the work happens and do not change what comes out."""
VERSIONS = ("ncsn", "torch", "ray", "kfp", "mlflow")


@dataclass(frozen=True)
class StepRun:
    """The MLflow run of one step."""

    client: MlflowClient
    uri: str
    experiment_id: str
    run_id: str
    parent_run_id: str

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings. One that the run has already keeps its value: MLflow's parameters do not change."""
        _log_params(self.client, self.run_id, params)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record results, `area/what` -> number, at `step` (images seen, where there is such a count)."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        for first in range(0, len(entries), BATCH):
            self.client.log_batch(self.run_id, metrics=entries[first : first + BATCH], synchronous=True)

    def metrics_sink(self) -> MetricsSink:
        """A picklable sender of this run's metrics for a training loop, perhaps in another process."""
        return MetricsSink(self.uri, self.run_id)

    def log_image(self, image: npt.NDArray[np.uint8], name: str, *, step: int | None = None) -> None:
        """Record a picture.

        Args:
            image: uint8 [H, W] or [H, W, C], C = 1 or 3.
            name: Without suffix. The artifact is `<name>.png`.
            step: Images seen, for a picture of a series: MLflow's page then shows it with a slider.
        """
        if step is None:
            self.client.log_image(self.run_id, image, artifact_file=f"{name}.png")
        else:
            self.client.log_image(self.run_id, image, key=name, step=step, synchronous=True)

    def log_file(self, uri: str, folder: str | None = None) -> None:
        """Copy one file of the store to the run's artifacts, below `folder`."""
        if storage.is_local(uri):
            self.client.log_artifact(self.run_id, uri, folder)
            return
        with tempfile.TemporaryDirectory(prefix="ncsn-") as temporary:
            local = Path(temporary) / uri.rsplit("/", 1)[-1]
            local.write_bytes(storage.read_bytes(uri))
            self.client.log_artifact(self.run_id, str(local), folder)

    def log_text(self, text: str, name: str) -> None:
        """Record a text as the artifact `name`."""
        self.client.log_text(self.run_id, text, name)

    def log_json(self, value: Mapping[str, Any], name: str) -> None:
        """Record plain values as the artifact `name`."""
        self.log_text(json.dumps(value, indent=1), name)

    def log_dataset(
        self, name: str, *, digest: str, uri: str, context: str = "training", profile: Mapping[str, Any] | None = None
    ) -> None:
        """Record which data the step read, for MLflow's "datasets used" and as the tag `dataset.digest`.

        Args:
            name: Name of the data set.
            digest: Content digest. MLflow's own field holds its first 36 characters, the tag all of it.
            uri: Folder in the store.
            context: What it was read for: `training`, `evaluation`.
            profile: Plain figures, such as counts.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:DIGEST_LENGTH],
            source_type="local" if storage.is_local(uri) else "s3",
            source=json.dumps({"uri": uri}),
            profile=json.dumps(profile) if profile else None,
        )
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
        for run_id in (self.run_id, self.parent_run_id):
            _set_tags(self.client, run_id, {"dataset.digest": digest, "dataset.uri": uri})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Attach tags, replacing those of the same name."""
        _set_tags(self.client, self.run_id, tags)


@contextmanager
def step_run(config: Config, *, run: str, step: str, tags: Mapping[str, str] | None = None) -> Iterator[StepRun]:
    """The MLflow run of one step of one pipeline run, ended when the block ends.

    Args:
        config: The experiment; its flattened values become the parameters, its YAML an artifact.
        run: Name of the pipeline run. With `storage.root` it identifies the parent run.
        step: Name of the step.
        tags: What else identifies the work: ids of the Ray job, of the KFP run.

    If `MLFLOW_RUN_ID` is set, as KFP's MLflow plugin does, that run is the parent.

    Raises:
        TrackingError: if the tracking server cannot be used.
    """
    connection = connect(config)
    parent, adopted = _parent(connection, config, run)
    child = _child(connection.client, parent, config, run, step)
    _set_tags(connection.client, child.info.run_id, tags or {})
    step_run_ = StepRun(
        client=connection.client,
        uri=connection.uri,
        experiment_id=child.info.experiment_id,
        run_id=child.info.run_id,
        parent_run_id=parent.info.run_id,
    )
    ids = [child.info.run_id] if adopted else [child.info.run_id, parent.info.run_id]
    try:
        yield step_run_
    except BaseException as error:
        _end(connection.client, ids, "FAILED" if isinstance(error, Exception) else "KILLED", error)
        raise
    _end(connection.client, ids, "FINISHED")


def _parent(connection: Connection, config: Config, run: str) -> tuple[Run, bool]:
    """The run of the whole pipeline, and whether somebody else opened it."""
    from mlflow.exceptions import MlflowException

    client = connection.client
    identity = _identity(config, run)
    if adopted := os.environ.get("MLFLOW_RUN_ID"):
        try:
            found = client.get_run(adopted)
        except MlflowException as error:
            raise TrackingError(f"MLFLOW_RUN_ID = {adopted!r} at {shown(connection.uri)}: {one_line(error)}") from error
        _set_tags(client, adopted, identity)
        return found, True
    whole = " and ".join([_filter(identity), "tags.`ncsn.part` = 'run'"])
    tags = {**identity, "ncsn.part": "run", **_provenance("ncsn run")}
    parent = _find_or_create(client, connection.experiment_id, whole, tags, name=run)
    _describe(client, parent, config)
    return parent, False


def _child(client: MlflowClient, parent: Run, config: Config, run: str, step: str) -> Run:
    identity = {**_identity(config, run), "ncsn.step": step, "ncsn.config": _result_digest(config)}
    tags = {**identity, "mlflow.parentRunId": parent.info.run_id, **_provenance(f"ncsn {step}")}
    child = _find_or_create(client, parent.info.experiment_id, _filter(identity), tags, name=step)
    _describe(client, child, config)
    return child


def _find_or_create(client: MlflowClient, experiment_id: str, query: str, tags: dict[str, str], *, name: str) -> Run:
    """The oldest run that answers `query`, set to running, or a new one.

    Two processes may create one at once. Both then see both and take the older; the other goes.
    """
    found = _search(client, experiment_id, query)
    if found is None:
        created = client.create_run(experiment_id, run_name=name, tags=tags)
        found = _search(client, experiment_id, query) or created
        if found.info.run_id != created.info.run_id:
            client.delete_run(created.info.run_id)
        return found
    _set_tags(client, found.info.run_id, tags)
    client.update_run(found.info.run_id, status="RUNNING")
    return found


def _search(client: MlflowClient, experiment_id: str, query: str) -> Run | None:
    found = client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time ASC"])
    return found[0] if found else None


def _identity(config: Config, run: str) -> dict[str, str]:
    return {"ncsn.run": run, "ncsn.root": storage.absolute(config.storage.root)}


def _result_digest(config: Config) -> str:
    """Digest of what can change a result: a step with other settings is another run, on another machine the same."""
    sections = config.model_dump(mode="json", exclude=set(PLACES))
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:16]


def _filter(tags: Mapping[str, str]) -> str:
    """MLflow's search expression for runs with all of these tags."""
    quoted = {key: f'"{value}"' if "'" in value else f"'{value}'" for key, value in tags.items()}
    return " and ".join(f"tags.`{key}` = {value}" for key, value in quoted.items())


def _provenance(command: str) -> dict[str, str]:
    """Tags that say which code, which versions and who."""
    tags = {"mlflow.source.name": command, "mlflow.source.type": "LOCAL", "python.version": platform.python_version()}
    for package in VERSIONS:
        try:
            tags[f"{package}.version"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := _git_commit():
        tags["mlflow.source.git.commit"] = commit
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user has no name
        tags["mlflow.user"] = str(os.getuid())
    return tags


def _git_commit() -> str | None:
    """Commit of the checkout that this code runs from; None for an installed package."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _describe(client: MlflowClient, run: Run, config: Config) -> None:
    """Parameters and YAML of the config, completed if an earlier try died in between."""
    _log_params(client, run.info.run_id, flatten(config))
    client.log_text(run.info.run_id, to_yaml(config), "config.yaml")


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    new = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in params.items() if key not in known]
    for first in range(0, len(new), BATCH):
        client.log_batch(run_id, params=new[first : first + BATCH], synchronous=True)


def _set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    entries = [RunTag(key, str(value)) for key, value in tags.items()]
    for first in range(0, len(entries), BATCH):
        client.log_batch(run_id, tags=entries[first : first + BATCH], synchronous=True)


def _end(client: MlflowClient, run_ids: list[str], status: str, error: BaseException | None = None) -> None:
    """Close the runs; if the server is gone as well, the first error is the one to show."""
    from mlflow.exceptions import MlflowException

    try:
        for run_id in run_ids:
            client.set_terminated(run_id, status)
    except MlflowException as failure:
        if error is None:
            raise
        error.add_note(f"(the run could not be closed in MLflow: {one_line(failure)})")
