"""The end of a run, whether it succeeded, failed or was canceled: its outcome goes to the store, MLflow and a page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ncsn.config import Config
from ncsn.errors import UserError
from ncsn.process import KFP_RUN_ID, KfpRun
from ncsn.remote import open_backend
from ncsn.report.cards import run_page
from ncsn.runs.folder import ForeignRun, RunFolder, claim_run
from ncsn.runs.records import Outcome, StepError, folders_of, read_result, read_step, write_outcome
from ncsn.runs.steps import SEARCH, STEPS
from ncsn.tracking.lineage import container_image, kfp_run
from ncsn.tracking.mlflow_runs import RecordedRun, close_run

if TYPE_CHECKING:
    from ncsn.remote.pods import Trouble

# States of the steps together that mean success: of `kfp.local`, and of KFP 2.17's backend, which uses MLMD's.
SUCCEEDED = ("SUCCEEDED", "COMPLETE", "CACHED")
_STOPPED = ("KeyboardInterrupt", "SystemExit")
# In Argo's message about a terminated step: Argo terminates a step by a zero deadline.
_DEADLINE = "exceeded its deadline"
_LOOK_SECONDS = 30.0
_UNKNOWN = "no reason is known; look at the log of the task"


@dataclass(frozen=True)
class FinishResult(Outcome):
    """How a run ended, and what was done about it."""

    cancelled: list[str] = field(default_factory=list)  # RayJobs and Ray jobs that were still running
    page: str = ""  # Markdown with links to everything


def run(
    config: Config,
    *,
    run: str,
    state: str,
    message: str = "",
    kfp: KfpRun | None = None,
    namespace: str | None = None,
) -> FinishResult:
    """Cancel what still runs, and write the outcome to the run's `status.json` and its MLflow run.

    KFP's `state` of the steps together is one of `SUCCEEDED`, FAILED or CANCELED. If the run belongs to another config,
    the page says so, and only what this pipeline run has started is touched. The pods of the pipeline run `kfp` tell
    why a step left no error; only its jobs are canceled then, because another pipeline run may have resumed the run. If
    the cluster cannot be asked, the error is raised after store and MLflow are updated.
    """
    try:
        folders = folders_of(claim_run(config, run), config)
    except ForeignRun as refusal:
        return _refused(config, run, str(refusal), kfp, namespace)
    runs = {folder.run: folder for folder in folders.values()}
    succeeded = state.upper() in SUCCEEDED
    seen = _Seen() if succeeded or kfp is None else _look(kfp, namespace)
    outcome = Outcome("FINISHED") if succeeded else _outcome(folders, state, message, kfp, seen)
    tags = kfp_run()
    try:
        ours = kfp.id if kfp else None
        canceled = [name for each in runs for name in _cancel(config, namespace, run=each, kfp_run=ours)]
    finally:
        for folder in runs.values():
            write_outcome(folder, outcome)
        closed = [close_run(config, run=each, status=outcome.status, tags=tags) for each in runs]
    decision = _result(folders["register"], "register")
    gate = [f"The gate: {decision['reason']}"] if decision else []
    page = run_page(
        run,
        status=outcome.status,
        reason=str(outcome),
        steps={step: _standing(folder, step, outcome.failed_step) for step, folder in folders.items()},
        places=_places(folders, [tracked for tracked in closed if tracked]),
        notes=[*gate, *seen.notes, *_stopped(canceled)],
    )
    return FinishResult(outcome.status, outcome.reason, outcome.failed_step, canceled, page)


def _refused(config: Config, run: str, reason: str, kfp: KfpRun | None, namespace: str | None) -> FinishResult:
    """End a pipeline run whose run name belongs to another config: store and MLflow run stay as they are."""
    canceled = _cancel(config, namespace, kfp_run=kfp.id) if kfp else []
    places = {"KFP run": kfp.id if kfp else "", "image": container_image()}
    page = run_page(run, status="FAILED", reason=reason, steps={}, places=places, notes=_stopped(canceled))
    return FinishResult("FAILED", reason, None, canceled, page)


@dataclass(frozen=True)
class _Seen:
    """What the cluster says about a pipeline run."""

    stopped: bool = False  # by a user
    troubles: Mapping[str, Trouble] = field(default_factory=dict)  # step -> what happened to its pod
    notes: Sequence[str] = ()  # sentences for the reader


def _look(kfp: KfpRun, namespace: str | None) -> _Seen:
    from ncsn.remote.kubernetes import KubernetesApi
    from ncsn.remote.launcher import was_stopped
    from ncsn.remote.orphans import troubles_of_run

    try:
        api = KubernetesApi(namespace, patience=_LOOK_SECONDS)
        stopped, troubles = was_stopped(api.workflow(kfp.workflow)), troubles_of_run(api, kfp.id)
        return _Seen(stopped, {task: trouble for task, trouble in troubles.items() if task in (*STEPS, SEARCH)})
    except (OSError, UserError) as error:
        return _Seen(notes=[f"The cluster could not be asked for the reason: {error}"])


def _cancel(config: Config, namespace: str | None, *, run: str | None = None, kfp_run: str | None = None) -> list[str]:
    """End the running jobs of a run or of a pipeline run; a RayJob that failed stays for a while, for inspection."""
    backend = open_backend(config.compute, namespace=namespace)
    return backend.stop(run=run, kfp_run=kfp_run) if backend else []


def _outcome(folders: Mapping[str, RunFolder], state: str, message: str, kfp: KfpRun | None, seen: _Seen) -> Outcome:
    """What stopped the run: the first step that has an error or no result, or a pod that was lost."""
    step, error = _first_open(folders, kfp)
    lost = ""
    if error is not None and error.kind == "SystemExit" and kfp is not None and not seen.notes and not seen.stopped:
        error = None  # an evicted pod gets SIGTERM too, and its state says more
    if not error and seen.troubles:
        step, trouble = next(iter(seen.troubles.items()))
        lost = str(trouble)
    terminated = seen.stopped or state.upper().startswith("CANCEL") or _DEADLINE in message
    if terminated or (error is not None and error.kind in _STOPPED):
        return Outcome("KILLED", "terminated", step)
    reason = (error.message if error else "") or lost or message or _UNKNOWN
    return Outcome("FAILED", str(reason), step)


def _first_open(folders: Mapping[str, RunFolder], kfp: KfpRun | None) -> tuple[str | None, StepError | None]:
    ours = kfp.id if kfp else os.environ.get(KFP_RUN_ID, "")
    for step, folder in folders.items():
        record = read_step(folder, step)
        if record.error is not None and record.error.kfp_run == ours:
            return step, record.error
        if not record.result:
            return step, None
    return None, None


def _stopped(jobs: Sequence[str]) -> list[str]:
    return [f"{name} was still running on the cluster and has been stopped." for name in jobs]


def _standing(folder: RunFolder, step: str, failed_step: str | None) -> str:
    if step == failed_step:
        return "failed"
    record = read_result(folder, step)
    return f"done in {record.seconds:,.1f} s, {record.finished_at}" if record else "not done"


def _places(
    folders: Mapping[str, RunFolder], closed: list[tuple[RecordedRun, Mapping[str, RecordedRun]]]
) -> dict[str, str]:
    """Links of the page, for the steps that ran."""
    recorded = {step: run.tags for _, steps in closed for step, run in steps.items()}
    tags = {**recorded.get("sample", {}), **recorded.get("train", {})}
    job = tags.get("ray.submission_id", "")  # none for a step with its own cluster: its pages end with it
    steps = ("ingest", "train", "register", "report")
    ingested, trained, registered, reported = (_result(folders[step], step) for step in steps)
    return {
        "MLflow run": closed[-1][0].place if closed else "",
        "MLflow run id": closed[-1][0].run_id if closed else "",
        "Ray job": job,
        "Ray dashboard": tags.get("ray.dashboard_url", "") if job else "",
        "dataset": ingested.get("uri", ""),
        "dataset digest": ingested.get("digest", ""),
        "checkpoint": trained.get("checkpoint", ""),
        "model": registered.get("uri", ""),
        "report": reported.get("uri", ""),
        "commit": tags.get("mlflow.source.git.commit", ""),
        "image": container_image(),
        "KFP run": kfp_run().get("kfp.pipeline_run_id", ""),
        "store": folders["register"].uri,
    }


def _result(folder: RunFolder, step: str) -> dict[str, Any]:
    record = read_result(folder, step)
    return dict(record.result) if record else {}
