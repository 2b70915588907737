"""Starts a pipeline on a Kubeflow cluster, once or on a schedule."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api
import urllib3

from ncsn.config import Config
from pipelines.connection import Connection, KfpError, reason_of
from pipelines.cron import kfp_schedule
from pipelines.package import package


@dataclass(frozen=True)
class Submission:
    """What to start.

    Attributes:
        pipeline: `train`, or another of `pipelines.compile.PIPELINES` without its ending.
        name: How the run is called on KFP's page.
        arguments: Parameter of the pipeline -> value.
        experiment: KFP's experiment.
        service_account: Of the pods; None = the cluster's default.
        cache: False makes every task work anew.
        known: Tasks that KFP may cache in addition, because the arguments tell all that they depend on.
        config: The experiment, which decides how large the pods are; None if it is not known.
    """

    pipeline: str
    name: str
    arguments: Mapping[str, Any]
    experiment: str
    service_account: str | None = None
    cache: bool = True
    known: Sequence[str] = ()
    config: Config | None = None


@dataclass(frozen=True)
class Submitted:
    """What was started: a run, or a schedule of runs.

    Attributes:
        id: KFP's identifier.
        url: Its page.
        experiment: KFP's experiment.
    """

    id: str
    url: str
    experiment: str


def require_access(connection: Connection) -> None:
    """Ask for something that only a user may see; the server tells anybody that it is well.

    Raises:
        KfpError: if the server refuses.
    """
    with _refusals(connection, "list experiments"):
        connection.client.list_experiments(page_size=1, namespace=connection.namespace)


def submit(connection: Connection, submission: Submission) -> Submitted:
    """Start one run.

    Raises:
        UserError: for an unknown pipeline, or an unknown, missing or ill-typed parameter.
        KfpError: if the server refuses.
    """
    with _packed(submission) as (file, arguments), _refusals(connection, f"start {submission.name!r}"):
        run = connection.client.run_pipeline(
            experiment_id=_experiment(connection, submission.experiment),
            job_name=submission.name,
            pipeline_package_path=str(file),
            params=arguments,
            service_account=submission.service_account,
        )
    return Submitted(run.run_id, connection.run_url(run.run_id), submission.experiment)


def schedule(connection: Connection, submission: Submission, *, every: str) -> Submitted:
    """Start a run whenever the clock says so, one at a time and none for times that were missed.

    Args:
        connection: The server.
        submission: What to start.
        every: Schedule in UTC, see `kfp_schedule`.

    Raises:
        UserError: for what `submit` refuses, and for an invalid schedule.
    """
    cron = kfp_schedule(every)
    with _packed(submission) as (file, arguments), _refusals(connection, f"schedule {submission.name!r}"):
        recurring = connection.client.create_recurring_run(
            experiment_id=_experiment(connection, submission.experiment),
            job_name=submission.name,
            cron_expression=cron,
            max_concurrency=1,
            no_catchup=True,
            params=arguments,
            pipeline_package_path=str(file),
            service_account=submission.service_account,
        )
    run_id = recurring.recurring_run_id
    return Submitted(run_id, connection.recurring_url(run_id), submission.experiment)


def _packed(submission: Submission) -> contextlib.AbstractContextManager[tuple[Path, dict[str, Any]]]:
    return package(
        submission.pipeline,
        submission.arguments,
        cache=submission.cache,
        known=submission.known,
        config=submission.config,
    )


def _experiment(connection: Connection, name: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()):  # KFP's client prints a link
        return str(connection.client.create_experiment(name, namespace=connection.namespace).experiment_id)


@contextlib.contextmanager
def _refusals(connection: Connection, doing: str) -> Iterator[None]:
    """Turn what the server refuses into a `KfpError`."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except kfp_server_api.ApiException as error:
        hint = {401: "renew the token or cookie", 403: "ask for the right to create runs there"}.get(error.status, "")
        raise KfpError(connection.host, f"cannot {doing}: {reason_of(error)}", hint=hint) from None
    except urllib3.exceptions.HTTPError as error:
        raise KfpError(connection.host, f"cannot {doing}: {reason_of(error)}") from None
