"""Starts a pipeline on a Kubeflow cluster, once or on a schedule."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api
import urllib3
import yaml

from ncsn.config import NOT_YAML, Config
from ncsn.errors import UserError
from pipelines.compile import PIPELINES, compile_one
from pipelines.connection import Connection, KfpError, reason_of

_FIELDS = 5  # of a schedule as people write it: minute, hour, day, month, weekday


@dataclass(frozen=True)
class Submission:
    pipeline: str  # `train`, or another of `PIPELINES` without its ending
    name: str  # of the run, on KFP's page
    arguments: Mapping[str, Any]  # text is read as YAML for a parameter that is no string
    experiment: str  # KFP's
    service_account: str | None = None  # of the pods; None = the cluster's default
    cache: bool = True  # False keeps every task out of KFP's cache
    known: Sequence[str] = ()  # tasks that KFP may cache in addition: the arguments tell all that they depend on
    config: Config | None = None  # decides how large the pods are; None if it is not known


@dataclass(frozen=True)
class Submitted:
    """A run, or a schedule of runs, that KFP has accepted."""

    id: str
    url: str
    experiment: str


def require_access(connection: Connection) -> None:
    """Ask for something that only a user may see; the health of the server is public."""
    with _refusals(connection, "list experiments"):
        connection.client.list_experiments(page_size=1, namespace=connection.namespace)


def submit(connection: Connection, submission: Submission) -> Submitted:
    """Start one run."""
    with package(submission) as (file, arguments), _refusals(connection, f"start {submission.name!r}"):
        run = connection.client.run_pipeline(
            experiment_id=connection.experiment_id(submission.experiment),
            job_name=submission.name,
            pipeline_package_path=str(file),
            params=arguments,
            service_account=submission.service_account,
        )
    return Submitted(run.run_id, connection.run_url(run.run_id), submission.experiment)


def schedule(connection: Connection, submission: Submission, *, every: str) -> Submitted:
    """Start a run at the times of a cron expression in UTC, one at a time; times that were missed are skipped."""
    cron = f"0 {every.strip()}" if len(every.split()) == _FIELDS else every  # KFP's first field is the second
    with package(submission) as (file, arguments), _refusals(connection, f"schedule {submission.name!r} by {every!r}"):
        recurring = connection.client.create_recurring_run(
            experiment_id=connection.experiment_id(submission.experiment),
            job_name=submission.name,
            cron_expression=cron,
            max_concurrency=1,
            no_catchup=True,
            params=arguments,
            pipeline_package_path=str(file),
            service_account=submission.service_account,
        )
    url = connection.run_url(recurring.recurring_run_id, kind="recurringrun")
    return Submitted(recurring.recurring_run_id, url, submission.experiment)


@contextlib.contextmanager
def package(submission: Submission) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The compiled pipeline in a temporary file, and the arguments, checked before anything is sent."""
    name = f"{submission.pipeline}_pipeline"
    if name not in PIPELINES:
        choices = ", ".join(known.removesuffix("_pipeline") for known in PIPELINES)
        raise UserError("--pipeline", "no such pipeline", hint=f"choose one of {choices}", value=submission.pipeline)
    with tempfile.TemporaryDirectory(prefix="ncsn-") as folder:
        path = compile_one(name, Path(folder), submission.config)
        spec, *platforms = yaml.safe_load_all(path.read_text())
        arguments = arguments_for(spec, submission.arguments)
        _set_caching(spec, cache=submission.cache, known=submission.known)
        path.write_text(yaml.safe_dump_all([spec, *platforms], sort_keys=True))
        yield path, arguments


def arguments_for(spec: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in the types of the parameters of a compiled pipeline; text is YAML where no text is asked for."""
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    for name in given.keys() - known.keys():
        raise UserError("--param", "unknown parameter", hint=f"choose of {', '.join(sorted(known))}", value=name)
    for name, parameter in known.items():
        if name not in given and "defaultValue" not in parameter and not parameter.get("isOptional"):
            hint = f"pass --param {name}=VALUE: {parameter.get('description', '')}"
            raise UserError("--param", f"the pipeline needs {name}", hint=hint)
    texts = {name for name, parameter in known.items() if parameter["parameterType"] == "STRING"}
    is_yaml = {name: isinstance(value, str) and name not in texts for name, value in given.items()}
    try:
        return {name: yaml.safe_load(value) if is_yaml[name] else value for name, value in given.items()}
    except NOT_YAML as error:
        raise UserError("--param", f"not valid YAML: {error}", value=dict(given)) from None


def _set_caching(spec: dict[str, Any], *, cache: bool, known: Sequence[str]) -> None:
    # In all graphs; KFP's client would miss the tasks inside an exit handler.
    for component in (spec["root"], *spec["components"].values()):
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            if not cache:
                task["cachingOptions"] = {}
            elif name in known:
                task["cachingOptions"] = {"enableCache": True}


@contextlib.contextmanager
def _refusals(connection: Connection, doing: str) -> Iterator[None]:
    """Turn the server's refusal into a `KfpError`."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # KFP's client prints links
            yield
    except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError) as error:
        hints = {401: "renew the token or cookie", 403: "ask for the right to create runs there"}
        hint = hints.get(getattr(error, "status", 0), "")
        raise KfpError(connection.host, f"cannot {doing}: {reason_of(error)}", hint=hint) from None
