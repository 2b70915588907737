"""One MLflow run per pipeline run and a child per step, found by their tags.

A retried step continues in the run of its first attempt. Nothing here depends on MLflow's global state: every call
names its run.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncsn import storage
from ncsn.clock import now_ms
from ncsn.config import Config, flatten, to_yaml
from ncsn.config.schema import TERMS
from ncsn.environment import CODE, CONTAINER_IMAGE, IMAGE_VARIABLE, KFP_RUN_ID
from ncsn.errors import without_users
from ncsn.runs.code import origin
from ncsn.runs.history import RATE
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import cost_of, read_attempt, read_outcome, spent, state_after, total_cost, update_attempt
from ncsn.runs.steps import FIRST, STEP_TABLE
from ncsn.tracking.client import (
    VIEW,
    Connection,
    TrackingError,
    client_at,
    connect,
    mlflow_errors,
    one_line,
    page,
    tag_filter,
    tracking_uri,
)
from ncsn.tracking.live import Point, send, send_missing

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient


PARAM_LENGTH, DIGEST_LENGTH = 6000, 36  # MLflow's limits
NOTE = "mlflow.note.content"  # tag with the description of a run, Markdown
PARENT = "mlflow.parentRunId"
CONTINUE_FROM = "ncsn.continue_from"  # URI of the run whose state training went on with
INIT_FROM = "ncsn.init_from"  # weights that training started from: models:/NAME/VERSION/DIGEST, or URI/DIGEST
ADOPTED = "MLFLOW_RUN_ID"  # variable with the run of the whole pipeline, if others have opened it
OUTAGE_SECONDS = 180.0  # how long a step waits for a server that the first one has reached, at its start and end

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRun(Connection):
    """The MLflow run of one step."""

    run_id: str
    parent_run_id: str
    folder: RunFolder

    @property
    def parent(self) -> StepRun:
        """The run of the whole pipeline, which has the results that tell runs apart."""
        return replace(self, run_id=self.parent_run_id)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record results, `area/what` -> number; the step is in images seen, where these are counted."""
        values = {name: float(value) for name, value in metrics.items()}
        send(self.client, self.run_id, [Point(step, now_ms(), values)])

    def log_file(self, uri: str, content: bytes | None = None) -> None:
        """Record a file of the store as an artifact, or one of this name and content."""
        with tempfile.TemporaryDirectory(prefix="ncsn-") as temporary:
            local = Path(temporary) / uri.rpartition("/")[2]
            local.write_bytes(storage.read_bytes(uri) if content is None else content)
            self.client.log_artifact(self.run_id, str(local))

    def log_dataset(self, name: str, *, digest: str, uri: str, context: str = "training") -> None:
        """Record which data the step read, as MLflow's "datasets used" and as tags, for the parent too."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source_type = "local" if storage.is_local(uri) else "s3"
        dataset = Dataset(name, digest[:DIGEST_LENGTH], source_type, json.dumps({"uri": uri}))
        read = [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
        for run_id in (self.run_id, self.parent_run_id):
            self.client.log_inputs(run_id, read)
            set_tags(self.client, run_id, {"dataset.digest": digest, "dataset.uri": uri})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        set_tags(self.client, self.run_id, tags)

    def nested(self, name: str, *, key: str, params: Mapping[str, Any]) -> StepRun:
        """The run below this one with this `key`, for example of a trial; a new one if there is none."""
        found = _open(self, {PARENT: self.run_id, "ncsn.key": key}, name=name, params=params)
        return replace(self, run_id=found.info.run_id, parent_run_id=self.run_id)


@contextmanager
def step_run(config: Config, *, run: str, step: str) -> Iterator[StepRun]:
    """The MLflow run of one step, which ends with the block; the block's seconds are added to those of the step.

    It is identified by `storage.root`, the name of the pipeline run, the step, and the settings that decide it. If
    `MLFLOW_RUN_ID` is set, as KFP's MLflow plugin does, that run is the parent, which stays open.
    """
    from mlflow.exceptions import MlflowException

    declared, folder = STEP_TABLE[step], RunFolder(storage.absolute(config.storage.root), run)
    connection = connect(config, patience=0 if step == FIRST else OUTAGE_SECONDS)
    client = connection.client
    with mlflow_errors(connection.uri):
        params, whole = flatten(config), _identity(folder, part="run")
        parent = _adopted(client) or _open(connection, whole, name=run, params=params, tags=provenance("ncsn run"))
        if (pipeline := read_outcome(folder)) and not os.environ.get(ADOPTED):  # this is a single step after it
            client.update_run(parent.info.run_id, status=pipeline.status)
        set_tags(client, parent.info.run_id, _identity(folder))
        # Other settings of what decides the result are another run.
        decides = config.model_dump(mode="json", include={*declared.decided_by}, exclude={"data": TERMS})
        digest = storage.digest(storage.relative_uris(decides, folder.root), 16)
        tags = {PARENT: parent.info.run_id, **provenance(f"ncsn {step}")}
        connection = replace(connection, experiment_id=parent.info.experiment_id)
        child = _open(connection, _identity(folder, step=step, config=digest), name=step, params=params, tags=tags)
        for each in (parent, child):
            client.log_text(each.info.run_id, to_yaml(config), "config.yaml")
        ids = child.info.experiment_id, child.info.run_id, parent.info.run_id
        tracked = StepRun(client, connection.uri, *ids, folder)
        update_attempt(folder, step, mlflow={"run_id": tracked.run_id, "parent_run_id": tracked.parent_run_id})
        if declared.curves:
            send_missing(client, tracked.run_id, folder)  # of an attempt that was killed
    started, status = time.time(), "FINISHED"
    try:
        with mlflow_errors(connection.uri):
            try:
                yield tracked
            finally:
                with suppress(OSError):  # a full disk must not hide the first error
                    seconds = read_attempt(folder, step).seconds + time.time() - started
                    update_attempt(folder, step, seconds=round(seconds, 3))
    except BaseException as error:
        status = state_after(error)
        raise
    finally:
        # Send what the step's run lacks and the costs, and end it and the parent, unless others opened or ended it.
        ended = now_ms()
        try:
            client = connect(config, patience=OUTAGE_SECONDS if status == "FINISHED" else 0).client
            if declared.curves:
                send_missing(client, tracked.run_id, folder)
            own = cost_of(config, step, read_attempt(folder, step).seconds)
            whole_cost = total_cost(spent(config, folder).values())
            for run_id, cost in ((tracked.run_id, own), (tracked.parent_run_id, whole_cost)):
                set_tags(client, run_id, {f"cost.{name}": f"{value:.6g}" for name, value in cost._asdict().items()})
            alone = os.environ.get(ADOPTED) or read_outcome(folder) is not None
            for run_id in (tracked.run_id,) if alone else (tracked.run_id, tracked.parent_run_id):
                client.set_terminated(run_id, status, end_time=ended)
        except (MlflowException, TrackingError, OSError) as error:  # the work is done, and the run folder has it
            where = without_users(tracked.uri)
            _logger.warning("the run of the step %s at %s is not complete: %s", step, where, one_line(error))


def _adopted(client: MlflowClient) -> Run | None:
    """The run that others, for example KFP's MLflow plugin, have opened for the whole pipeline."""
    from mlflow.exceptions import MlflowException

    if not (run_id := os.environ.get(ADOPTED)):
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        raise TrackingError(
            ADOPTED, f"{one_line(error)} (at {without_users(client.tracking_uri)})", value=run_id
        ) from error


def _identity(folder: RunFolder, **more: str) -> dict[str, str]:
    """The tags that all MLflow runs of a pipeline run share, and some more."""
    return {"ncsn.run": folder.run, "ncsn.root": folder.root, **{f"ncsn.{key}": value for key, value in more.items()}}


def _open(
    connection: Connection,
    identity: Mapping[str, str],
    *,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] = {},
) -> Run:
    """The first run with the tags `identity`, set to running, or a new one; with those of the parameters it lacks."""
    from mlflow.entities import Param

    client, found = connection.client, search_runs(connection.client, connection.experiment_id, identity)
    if found:
        run = found[0]
        set_tags(client, run.info.run_id, tags)
        client.update_run(run.info.run_id, status="RUNNING")
    else:
        run = client.create_run(connection.experiment_id, run_name=name, tags={**identity, **tags})
    # MLflow's parameters do not change.
    new = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in params.items() if key not in run.data.params]
    client.log_batch(run.info.run_id, params=new)
    return run


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])


def search_runs(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> list[Run]:
    """The runs with these tags, the latest last."""
    return list(client.search_runs([experiment_id], tag_filter(tags), order_by=["attributes.start_time ASC"]))


def provenance(command: str) -> dict[str, str]:
    """The tags of a run that `command` opened."""
    tags = {"mlflow.source.name": command, "mlflow.source.type": "LOCAL", "python.version": platform.python_version()}
    for package in ("ncsn", "torch", "ray", "kfp", "mlflow"):
        with suppress(importlib.metadata.PackageNotFoundError):
            tags[f"{package}.version"] = importlib.metadata.version(package)
    tags |= kfp_run()
    if image := container_image():
        tags["mlflow.docker.image.uri"] = image
    tags |= {f"mlflow.source.git.{name}": value for name, value in origin().items()}
    if code := os.environ.get(CODE):
        tags |= {"ncsn.code.uri": code, "ncsn.code.digest": code.rpartition("/")[2].removesuffix(".zip")}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user has no name
        tags["mlflow.user"] = str(os.getuid())
    return tags


def container_image() -> str:
    """The image that this process runs in; empty if none is known."""
    # NCSN_IMAGE alone does not say so: a task that KFP runs on this machine has it too, and so has a shell that
    # submits pipelines. /.dockerenv and KUBERNETES_SERVICE_HOST also exist on build servers.
    image = os.environ.get(CONTAINER_IMAGE, "")
    return image or (os.environ.get(IMAGE_VARIABLE, "") if os.environ.get(KFP_RUN_ID) else "")


def kfp_run() -> dict[str, str]:
    """Tags of the KFP run that this process is a task of, as KFP's MLflow plugin names them; empty if it is none."""
    # The pod knows the run's id; the address of its page is known if the namespace has that of KFP's pages.
    run, pages = os.environ.get(KFP_RUN_ID), os.environ.get("NCSN_KFP_UI")
    if not run:
        return {}
    page = {"kfp.pipeline_run_url": f"{pages.rstrip('/')}/#/runs/details/{run}"} if pages else {}
    return {"kfp.pipeline_run_id": run} | page


def front_page(uri: str, *, run: str | None) -> str:
    """Where a server has this run or, without one, the list of runs with their distances, verdicts and speeds."""
    client, tags = client_at(uri), {"ncsn.part": "run"} | ({"ncsn.run": run} if run else {})
    with mlflow_errors(uri):
        experiments = [each.experiment_id for each in client.search_experiments()]
        runs = client.search_runs(experiments, tag_filter(tags), order_by=["attributes.start_time DESC"])
        if not runs:
            return "/#/experiments"
        newest = runs[0].info
        place = f"/#/experiments/{newest.experiment_id}/runs"
        if run:
            return f"{place}/{newest.run_id}{VIEW}"
        # MLflow has a view of the list, which an address can name, as a tag of the experiment.
        names = [name for each in runs if each.info.experiment_id == newest.experiment_id for name in each.data.metrics]
        distances = [name for name in dict.fromkeys(names) if "_fid_n" in name and "/real_" not in name]
        view = {"selectedColumns": ["tags.`eval.verdict`", *(f"metrics.`{name}`" for name in (*distances, RATE))]}
        client.set_experiment_tag(newest.experiment_id, "mlflow.sharedViewState.ncsn", json.dumps(view))
    return f"{place}{VIEW}&viewStateShareKey=ncsn"


def close_run(config: Config, *, run: str, status: str, tags: Mapping[str, str]) -> dict[str, str]:
    """Give the run, and steps that ended without reporting, a status of MLflow; the run's page and id.

    Empty if MLflow has no such run. A run that others have opened, for example KFP's MLflow plugin, stays open.
    """
    uri = tracking_uri(config)
    client, folder = client_at(uri), RunFolder(storage.absolute(config.storage.root), run)
    with mlflow_errors(uri):
        adopted = _adopted(client)
        whole = adopted
        if whole is None and (experiment := client.get_experiment_by_name(config.tracking.experiment)):
            whole = next(iter(search_runs(client, experiment.experiment_id, _identity(folder, part="run"))), None)
        if whole is None:
            return {}
        parent = whole.info
        set_tags(client, parent.run_id, tags)
        for step in search_runs(client, parent.experiment_id, {PARENT: parent.run_id}):
            if step.info.status == "RUNNING":
                declared = STEP_TABLE.get(step.data.tags.get("ncsn.step", ""))
                if declared is not None and declared.curves:
                    send_missing(client, step.info.run_id, folder)
                client.set_terminated(step.info.run_id, "KILLED" if status == "FINISHED" else status)
        if not adopted:
            client.set_terminated(parent.run_id, status)
    place = page(uri, parent.experiment_id, parent.run_id) or without_users(uri)
    return {"MLflow run": place, "MLflow run id": parent.run_id}
