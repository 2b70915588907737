"""The end of a run, whether it succeeded, failed or was canceled: its outcome goes to the store, MLflow and a page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ncsn import storage
from ncsn.config import Config
from ncsn.environment import KFP_RUN_ID, KfpRun
from ncsn.errors import UserError
from ncsn.remote import open_backend
from ncsn.report.pages import render
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import (
    ForeignRun,
    Outcome,
    finished_steps,
    folders_of,
    read_attempt,
    read_finished,
    read_outcome,
    update_attempt,
    write_outcome,
)
from ncsn.runs.run import Run
from ncsn.runs.steps import FIRST, PIPELINE, STEP_TABLE
from ncsn.tracking.mlflow_runs import close_run, container_image, kfp_run

if TYPE_CHECKING:
    from ncsn.remote.pods import Trouble

# States of the steps together that mean success: of `kfp.local`, and of KFP 2.17's backend, which uses MLMD's.
STEPS_SUCCEEDED = ("SUCCEEDED", "COMPLETE", "CACHED")
# In Argo's message about a terminated step: Argo terminates a step by a zero deadline.
_DEADLINE = "exceeded its deadline"
_LOOK_SECONDS = 30.0


@dataclass(frozen=True)
class FinishResult(Outcome):
    """How a run ended, and what was done about it."""

    canceled: list[str] = field(default_factory=list)  # RayJobs and Ray jobs that were still running
    page: str = ""  # Markdown with links to everything


def run(
    config: Config, *, run: str, state: str, message: str = "", kfp: KfpRun | None = None, namespace: str | None = None
) -> FinishResult:
    """Cancel what still runs, and write the outcome to the run's `status.json` and its MLflow run.

    KFP's `state` of the steps together is one of `STEPS_SUCCEEDED`, FAILED or CANCELED. If the run belongs to another
    config, the page says so, and only what this pipeline run has started is touched. The pods of the pipeline run `kfp`
    tell why a step left no error; only its jobs are canceled then, because another pipeline run may have resumed the
    run. If the cluster cannot be asked, the error is raised after store and MLflow are updated.
    """
    backend = open_backend(config.compute, namespace=namespace)
    ours, canceled, notes = kfp.id if kfp else None, list[str](), list[str]()
    steps, places = dict[str, str](), {"image": container_image(), "KFP run": ours or ""}
    try:
        mine = Run(config, run)
        mine.claim()
        folder = mine.folder
        if ours and storage.exists(refused := folder.step(FIRST, f"refused-{ours}")):
            raise ForeignRun("", storage.read_text(refused))
        folders = folders_of(folder, config)
    except ForeignRun as refusal:  # its store and MLflow run stay as they are
        outcome = Outcome("FAILED", str(refusal))
        canceled += backend.stop(run=None, kfp_run=ours) if backend and ours else []
    else:
        runs = {folder.run: folder for folder in folders.values()}
        alone = kfp is None and state.upper().startswith("CANCEL")  # a launcher is gone, perhaps of a later step
        before = read_outcome(folders[FIRST]) if alone else None
        if state.upper() in STEPS_SUCCEEDED:
            outcome = Outcome("FINISHED")
        elif before is not None:
            outcome = before
        else:
            terminated, troubles = _look(kfp, namespace, notes)
            terminated = terminated or state.upper().startswith("CANCEL") or _DEADLINE in message
            looked = kfp is not None and not notes
            outcome = _outcome(folders, ours, message, troubles, terminated=terminated, looked=looked)
        try:
            for each in runs if backend else ():
                canceled += backend.stop(run=each, kfp_run=ours)  # type: ignore[union-attr]
        finally:
            tags = kfp_run()
            for folder in () if before else runs.values():
                write_outcome(folder, outcome, closed=folder.run == run)
            for step, folder in folders.items() if before else ():
                if read_attempt(folder, step).state == "RUNNING":
                    update_attempt(folder, step, state="KILLED")
            for each in runs:
                places |= close_run(config, run=each, status=outcome.status, tags=tags)
        finished, headlines = finished_steps(folders), list[str]()
        for step in folders:
            record = finished.get(step)
            if record is None:
                done = "not done"
            else:
                done = f"done in {record.seconds:,.1f} s, {record.finished_at}"
                headlines += filter(None, [record.result.headline])
                places |= {name: record.values[field] for name, field in STEP_TABLE[step].links.items()}
            steps[step] = "failed" if step == outcome.failed_step else done
        places["store"] = [*folders.values()][-1].uri
        notes = [*headlines, *notes]
    notes += [f"{name} was still running on the cluster and has been stopped." for name in canceled]
    page = render("run_page.md.j2", run=run, outcome=outcome, steps=steps, places=places, notes=notes)
    return FinishResult(outcome.status, outcome.reason, outcome.failed_step, canceled, page)


def _look(kfp: KfpRun | None, namespace: str | None, notes: list[str]) -> tuple[bool, Mapping[str, Trouble]]:
    """Whether a person stopped the pipeline run, and what happened to the pods of its steps."""
    if kfp is None:
        return False, {}
    from ncsn.remote.kubernetes import KubernetesApi, was_stopped
    from ncsn.remote.pods import troubles_of_run

    stopped = False
    troubles: Mapping[str, Trouble] = {}
    try:
        api = KubernetesApi(namespace, patience=_LOOK_SECONDS)
        stopped = was_stopped(api.get("workflows", kfp.workflow))
        troubles = troubles_of_run(api, kfp.id)
    except (OSError, UserError) as error:
        notes.append(f"The cluster could not be asked for the reason: {error}")
    return stopped, {task: trouble for task, trouble in troubles.items() if task in PIPELINE}


def _outcome(
    folders: Mapping[str, RunFolder],
    kfp_run_id: str | None,
    message: str,
    troubles: Mapping[str, Trouble],
    *,
    terminated: bool,
    looked: bool,
) -> Outcome:
    """What stopped the run: the first step that has an error or no result, or a pod that was lost."""
    ours = kfp_run_id or os.environ.get(KFP_RUN_ID, "")
    step, error, lost = None, None, None
    for name, folder in folders.items():
        error = read_attempt(folder, name).error
        if error is not None and error.kfp_run != ours:
            error = None
        if error is not None or read_finished(folder, name) is None:
            step = name
            break
    if error is not None and error.kind == "SystemExit" and looked and not terminated:
        error = None  # an evicted pod gets SIGTERM too, and its state says more
    told = read_outcome([*folders.values()][-1]) if error is None or terminated else None
    if told is not None and told.status == "FAILED" and told.failed_step in folders:
        theirs = read_attempt(folders[str(told.failed_step)], str(told.failed_step)).error
        # A task of another pipeline run, which works on the same run, said that it failed, and that still holds.
        if theirs is not None and theirs.message == told.reason and theirs.kfp_run != ours:
            return told
    if not error and troubles:
        step, lost = next(iter(troubles.items()))
    if terminated or (error is not None and error.kind in ("KeyboardInterrupt", "SystemExit", "LeaseExpired")):
        return Outcome("KILLED", "terminated", step)
    reason = (error.message if error else str(lost or "")) or message
    return Outcome("FAILED", reason or "no reason is known; look at the log of the task", step)
