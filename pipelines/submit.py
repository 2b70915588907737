"""Starts a pipeline on a Kubeflow cluster, once or on a schedule, and waits for it."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api
import urllib3

from pipelines.connection import Connection, KfpError
from pipelines.cron import kfp_schedule
from pipelines.package import package

SUCCEEDED = ("SUCCEEDED", "SKIPPED")
ENDED = (*SUCCEEDED, "FAILED", "CANCELED")
POLL_SECONDS = 5.0
PATIENCE_SECONDS = 300
"""How long the server may be away while somebody waits for a run."""


class RunFailed(Exception):
    """A run ended in another state than success."""


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
    """

    pipeline: str
    name: str
    arguments: Mapping[str, Any]
    experiment: str
    service_account: str | None = None
    cache: bool = True
    known: Sequence[str] = ()


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
    with _refusals("list experiments"):
        connection.client.list_experiments(page_size=1, namespace=connection.namespace)


def submit(connection: Connection, submission: Submission) -> Submitted:
    """Start one run.

    Raises:
        ValueError: for an unknown pipeline, an unknown, missing or ill-typed parameter, or what the server refuses.
    """
    with _packed(submission) as (file, arguments), _refusals(f"start {submission.name!r}"):
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
        ValueError: as `submit`, and for a schedule that is none.
    """
    cron = kfp_schedule(every)
    with _packed(submission) as (file, arguments), _refusals(f"schedule {submission.name!r}"):
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


def wait(
    connection: Connection, run_id: str, *, on_state: Callable[[str], None], poll_seconds: float = POLL_SECONDS
) -> None:
    """Return when the run has succeeded.

    KFP's own wait does not know that a cancelled run has ended.

    Args:
        connection: The server.
        run_id: KFP's identifier of the run.
        on_state: Told each new state.
        poll_seconds: Time between two questions.

    Raises:
        RunFailed: if it ended otherwise; the message names the tasks and the reason.
    """
    last, answered = None, time.monotonic()
    while True:
        try:
            run = connection.client.get_run(run_id)
            answered = time.monotonic()
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError) as error:
            gone = isinstance(error, kfp_server_api.ApiException) and 400 <= (error.status or 0) < 500
            if gone or time.monotonic() - answered > PATIENCE_SECONDS:
                raise KfpError(
                    f"run {run_id} cannot be watched any more: {_reason(error)}; it may still be running: "
                    f"{connection.run_url(run_id)}"
                ) from None
            time.sleep(poll_seconds)
            continue
        if run.state != last:
            last = run.state
            on_state(last or "UNKNOWN")
        if last in SUCCEEDED:
            return
        if last in ENDED:
            raise RunFailed(f"run {run_id} ended {last}{_why(run)}; see {connection.run_url(run_id)}")
        time.sleep(poll_seconds)


def _packed(submission: Submission) -> contextlib.AbstractContextManager[tuple[Path, dict[str, Any]]]:
    return package(submission.pipeline, submission.arguments, cache=submission.cache, known=submission.known)


def _experiment(connection: Connection, name: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()):  # KFP's client prints a link
        return str(connection.client.create_experiment(name, namespace=connection.namespace).experiment_id)


@contextlib.contextmanager
def _refusals(doing: str) -> Iterator[None]:
    """Make the server's refusals one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except kfp_server_api.ApiException as error:
        hint = {401: "; renew the token or cookie", 403: "; ask for the right to create runs there"}.get(
            error.status, ""
        )
        raise KfpError(f"cannot {doing}: {_reason(error)}{hint}") from None
    except urllib3.exceptions.HTTPError as error:
        raise KfpError(f"cannot {doing}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What the server said, or what became of the connection."""
    if not isinstance(error, kfp_server_api.ApiException):
        return f"no answer ({str(error).rpartition(': ')[2]})"
    try:
        message = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = error.reason
    return f"{' '.join(str(message).split())} ({error.status})"


def _why(run: Any) -> str:
    """The failed tasks and the error of a run, as far as KFP tells."""
    details = (run.run_details.task_details if run.run_details else None) or []
    failed = [task.display_name for task in details if task.state == "FAILED" and task.display_name]
    parts = [f"failed: {', '.join(failed)}"] if failed else []
    parts += [" ".join(run.error.message.split())] if run.error and run.error.message else []
    return f" ({'; '.join(parts)})" if parts else ""
