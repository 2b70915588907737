"""Ends what nobody waits for any more, and tells store and MLflow how it ended.

A pipeline run that is terminated or deleted may leave a RayJob at work and an MLflow run open: its tasks have less than
a second, and its exit handler may never start. So somebody looks from outside, again and again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ncsn import storage
from ncsn.config import Config, from_json, from_yaml
from ncsn.process import KfpRun
from ncsn.remote.kubernetes import KubernetesApi, Resource
from ncsn.remote.launcher import is_ending, is_over
from ncsn.remote.orphans import NotedRun, Orphan, find_orphans, forget_run, noted_runs, state_of_run
from ncsn.runs.folder import run_folder
from ncsn.runs.records import read_outcome
from ncsn.storage.retry import limited

_STORE_SECONDS = 20.0


@dataclass(frozen=True)
class Deed:
    """Something that was done, or would be.

    Attributes:
        verb: delete, close or ignore.
        what: The rest of the sentence.
        error: Why it could not be done.
    """

    verb: str
    what: str
    error: Exception | None = None


def clean_up(
    api: KubernetesApi, *, older_than: float, run: str | None = None, at_work: bool = False, dry_run: bool = False
) -> Iterator[Deed]:
    """Delete RayJobs that nobody waits for, and close runs whose pipeline has ended without doing so.

    Args:
        api: The cluster, and the namespace to look in.
        older_than: Seconds of a launcher's silence after which its RayJob is deleted.
        run: Only what belongs to this run.
        at_work: Leave RayJobs that have ended.
        dry_run: Do nothing.

    Yields:
        One deed after the other. One that fails does not keep the others from being done.
    """

    def do(verb: str, what: str, action: Callable[[], None]) -> Deed:
        try:
            if not dry_run:
                action()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are not to suffer
            return Deed(verb, what, error)
        return Deed(verb, what)

    notes = noted_runs(api)
    workflows = {each.id: api.workflow(each.workflow) for each in notes}
    resumed = {_place(each) for each in notes if not is_ending(workflows[each.id])}
    noted = {each.id: each for each in notes if run in (None, each.run)}
    for orphan in find_orphans(api, older_than=older_than, run=run, at_work=at_work):
        yield do("delete", orphan.describe(), lambda name=orphan.name: api.delete_rayjob(name))  # type: ignore[misc]
        if orphan.config and not orphan.finished and orphan.kfp_run not in noted:
            yield do("close", f"run {orphan.run}: KILLED", lambda each=orphan: _close_orphan(each))  # type: ignore[misc]
    for each in noted.values():
        workflow = workflows[each.id]
        if not is_ending(workflow):
            continue
        if _place(each) in resumed:  # its records are those of the pipeline run that goes on
            what = f"run {each.run} of {each.id}: another pipeline run continues it"
            yield do("ignore", what, lambda each=each: forget_run(api, each))  # type: ignore[misc]
        else:
            what = f"run {each.run}: pipeline run {each.id}: {state_of_run(workflow)}"
            yield do("close", what, lambda each=each, workflow=workflow: _close(api, each, workflow))  # type: ignore[misc]


def _place(noted: NotedRun) -> tuple[str, str]:
    """What two pipeline runs share that work on one run: its name and its store."""
    return noted.run, json.loads(noted.config).get("storage", {}).get("root", "")


def _close(api: KubernetesApi, noted: NotedRun, workflow: Resource | None) -> None:
    """Close the run, and forget it unless something may still be running: that could have the last word in MLflow."""
    config, state = from_json(noted.config), state_of_run(workflow)
    if workflow is None:  # deleted, perhaps long after its end
        with limited(_STORE_SECONDS):
            told = read_outcome(run_folder(config, noted.run))
        if told is not None and told.status == "FINISHED":
            state = "SUCCEEDED"
        elif told is not None and told.status == "FAILED":
            forget_run(api, noted)
            return
    try:
        cancelled = _finish(config, noted.run, state, kfp=KfpRun(noted.id, noted.workflow), namespace=api.namespace)
    except PermissionError:
        if config.compute.kuberay.namespace in (None, api.namespace):
            raise
        cancelled = []  # store and MLflow are told; RayJobs of another namespace end there, by its janitor or the lease
    if is_over(workflow) and not cancelled:
        forget_run(api, noted)


def _close_orphan(orphan: Orphan) -> None:
    with limited(_STORE_SECONDS):
        config = from_yaml(storage.read_text(orphan.config), origin=orphan.config)
    _finish(config, orphan.run, "CANCELED")


def _finish(
    config: Config, run: str, state: str, *, kfp: KfpRun | None = None, namespace: str | None = None
) -> list[str]:
    # Imported here and not above: MLflow takes seconds, and most of the time there is nothing to close.
    from ncsn.steps import finish

    with limited(_STORE_SECONDS):
        return finish.run(config, run=run, state=state, kfp=kfp, namespace=namespace).cancelled
