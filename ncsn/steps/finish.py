"""The end of a run, whether it succeeded, failed or was cancelled: the outcome is written where people look."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from ncsn import storage
from ncsn.config import Config
from ncsn.report.run_page import RunFacts, run_page
from ncsn.steps.result import STEPS, RunFolder, claim_run
from ncsn.tracking.outcome import TrackedRun, close_run
from ncsn.tracking.provenance import container_image, kfp_run

STATUS_FILE = "status.json"
SEARCH = "tune"
"""The step between the first and the second, where there is one."""
_STOPPED = ("KeyboardInterrupt", "SystemExit")
_DEADLINE = "exceeded its deadline"
"""What Argo says of a step that somebody terminated: that is how it ends them."""


@dataclass(frozen=True)
class FinishResult:
    """How a run ended.

    Attributes:
        status: FINISHED, FAILED or KILLED, as MLflow calls it.
        reason: Why, if it did not finish.
        failed_step: The step that stopped it, if one did.
        cancelled: RayJobs and Ray jobs that were still at work and are ended.
        page: Markdown with where everything is.
    """

    status: str
    reason: str
    failed_step: str | None
    cancelled: list[str]
    page: str


def run(config: Config, *, run: str, state: str, message: str = "") -> FinishResult:
    """Cancel what is at work, and write the outcome to `<root>/runs/<run>/status.json` and the run's MLflow run.

    Args:
        config: The experiment.
        run: Name of the run.
        state: What KFP says of the steps together: SUCCEEDED, FAILED or CANCELLED.
        message: What KFP says of the reason.

    Raises:
        ValueError: if the run belongs to another config, or MLflow could not be told.
        PermissionError, ConnectionError: if the cluster could not be asked. Store and MLflow are told nevertheless.
    """
    folders = _folders(claim_run(config, run))
    runs = {folder.run: folder for folder in folders.values()}
    status, failed_step, reason = _outcome(folders, state, message)
    record = {"status": status, "reason": reason, "failed_step": failed_step, "finished_at": _now()}
    tags = kfp_run()
    try:
        cancelled = [name for each in runs for name in _cancel(config, each)]
    finally:
        for folder in runs.values():
            storage.write_text(storage.join(folder.uri, STATUS_FILE), json.dumps(record, indent=1))
        closed = [close_run(config, run=each, status=status, tags=tags) for each in runs]
    facts = RunFacts(
        run=run,
        status=status,
        reason=f"{failed_step}: {reason}" if failed_step else reason,
        steps={step: _standing(folder, step, failed_step) for step, folder in folders.items()},
        places=_places(folders, [tracked for tracked in closed if tracked]),
        notes=[*_notes(folders), *(f"{name} was still at work on the cluster and is stopped." for name in cancelled)],
    )
    return FinishResult(status, reason, failed_step, cancelled, run_page(facts))


def _folders(folder: RunFolder) -> dict[str, RunFolder]:
    """Step -> the folder of its run. What a search found is trained as a run of its own, which the search names."""
    if all(_read(folder.step(SEARCH, file)) is None for file in ("result.json", "error.json")):
        return dict.fromkeys(STEPS, folder)
    found = replace(folder, run=_result(folder, SEARCH).get("run", folder.run))
    return {STEPS[0]: folder, SEARCH: folder, **dict.fromkeys(STEPS[1:], found)}


def _cancel(config: Config, run: str) -> list[str]:
    """End the jobs of the run that are at work. A RayJob that failed stays for a while, to be looked at."""
    if config.compute.backend == "local":
        return []
    if config.compute.backend == "ray-jobs":
        from ncsn.cluster.ray_jobs import RayJobs

        return RayJobs(config.compute).stop_all(run)
    from ncsn.cluster.api import KubernetesApi
    from ncsn.cluster.reap import reap

    api = KubernetesApi(config.compute.kuberay.namespace)
    return [orphan.name for orphan in reap(api, older_than=0, run=run, at_work=True)]


def _outcome(folders: Mapping[str, RunFolder], state: str, message: str) -> tuple[str, str | None, str]:
    """Status, the step that stopped the run, and the reason."""
    if state.upper().startswith("SUCC"):
        return "FINISHED", None, ""
    stored = {step: _read(folder.step(step, "error.json")) for step, folder in folders.items()}
    errors = {step: error for step, error in stored.items() if error is not None}
    step, error = next(iter(errors.items()), (None, {}))
    stopped = state.upper().startswith("CANCEL") or _DEADLINE in message or error.get("type") in _STOPPED
    reason = error.get("message") or message or "KFP gives no reason; look at the log of the task"
    return "KILLED" if stopped else "FAILED", step, str(reason)


def _standing(folder: RunFolder, step: str, failed_step: str | None) -> str:
    if step == failed_step:
        return "failed"
    record = _read(folder.step(step, "result.json"))
    return f"done in {record['seconds']:,.1f} s, {record['finished_at']}" if record else "not done"


def _places(folders: Mapping[str, RunFolder], closed: list[TrackedRun]) -> dict[str, str]:
    """What the page links to, as far as the steps came."""
    noted = {step: tags for tracked in closed for step, tags in tracked.tags.items()}
    tags = {**noted.get("sample", {}), **noted.get("train", {})}
    steps = ("ingest", "train", "register", "report")
    ingested, trained, registered, reported = (_result(folders[step], step) for step in steps)
    return {
        "MLflow run": closed[-1].place if closed else "",
        "MLflow run id": closed[-1].run_id if closed else "",
        "Ray job": tags.get("ray.submission_id") or tags.get("ray.job_id", ""),
        "Ray dashboard": tags.get("ray.dashboard_url", ""),
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


def _notes(folders: Mapping[str, RunFolder]) -> list[str]:
    registered = _result(folders["register"], "register")
    return [f"The gate: {registered['reason']}"] if registered else []


def _result(folder: RunFolder, step: str) -> dict[str, Any]:
    record = _read(folder.step(step, "result.json"))
    return record["result"] if record else {}


def _read(uri: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = storage.read_json(uri)
    except FileNotFoundError:
        return None
    return record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
