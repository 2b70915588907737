"""Delete RayJobs without a launcher, and close the runs of pipelines that ended without closing them.

The tasks of a terminated or deleted pipeline run have less than a second to stop, and its exit handler may never start.
So a RayJob may still run and an MLflow run be open, and the janitor looks for both at intervals.
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
from ncsn.runs.folder import RunFolder, run_folder
from ncsn.runs.records import read_outcome
from ncsn.storage.retry import limited

_STORE_SECONDS = 20.0


@dataclass(frozen=True)
class Action:
    """Something that was done, or would be."""

    verb: str  # delete, close or ignore
    what: str  # the rest of the sentence
    error: Exception | None = None  # why it could not be done


def clean_up(
    api: KubernetesApi, *, older_than: float, run: str | None = None, running: bool = False, dry_run: bool = False
) -> Iterator[Action]:
    """Delete RayJobs whose launcher is silent for `older_than` seconds, and close runs that their pipeline left open.

    Only what belongs to `run`, if it is given; with `running`, RayJobs that have ended stay. An action that fails does
    not stop the others.
    """

    def do(verb: str, what: str, action: Callable[[], None]) -> Action:
        try:
            if not dry_run:
                action()
        except Exception as error:  # noqa: BLE001 - the others go on
            return Action(verb, what, error)
        return Action(verb, what)

    notes = noted_runs(api)
    workflows = {each.id: api.workflow(each.workflow) for each in notes}
    resumed = {_place(each) for each in notes if not is_ending(workflows[each.id])}
    noted = {each.id: each for each in notes if run in (None, each.run)}
    for orphan in find_orphans(api, older_than=older_than, run=run, running=running):
        yield do("delete", orphan.describe(), lambda name=orphan.name: api.delete_rayjob(name))  # type: ignore[misc]
        if orphan.settings and not orphan.finished and orphan.kfp_run not in noted:
            yield do("close", f"run {orphan.run}: KILLED", lambda each=orphan: _close_orphan(each))  # type: ignore[misc]
    for each in noted.values():
        workflow = workflows[each.id]
        if not is_ending(workflow):
            continue
        if _place(each) in resumed:  # the records belong to the pipeline run that continues it
            what = f"run {each.run} of {each.id}: another pipeline run continues it"
            yield do("ignore", what, lambda each=each: forget_run(api, each))  # type: ignore[misc]
        else:
            what = f"run {each.run}: pipeline run {each.id}: {state_of_run(workflow)}"
            yield do("close", what, lambda each=each, workflow=workflow: _close(api, each, workflow))  # type: ignore[misc]


def _place(noted: NotedRun) -> tuple[str, str]:
    """Name and store of the run: equal for pipeline runs that work on the same one."""
    return noted.run, json.loads(noted.config).get("storage", {}).get("root", "")


def _close(api: KubernetesApi, noted: NotedRun, workflow: Resource | None) -> None:
    """Close the run, and forget it unless something may still run and change its MLflow run later."""
    config, state = from_json(noted.config), state_of_run(workflow)
    if workflow is None:  # deleted, perhaps long after its end
        with limited(_STORE_SECONDS):
            outcome = read_outcome(run_folder(config, noted.run))
        if outcome is not None and outcome.status == "FINISHED":
            state = "SUCCEEDED"
        elif outcome is not None and outcome.status == "FAILED":
            forget_run(api, noted)
            return
    try:
        canceled = _finish(config, noted.run, state, kfp=KfpRun(noted.id, noted.workflow), namespace=api.namespace)
    except PermissionError:
        if config.compute.kuberay.namespace in (None, api.namespace):
            raise
        canceled = []  # RayJobs of another namespace end by that one's janitor or by their lease
    if is_over(workflow) and not canceled:
        forget_run(api, noted)


def _close_orphan(orphan: Orphan) -> None:
    uri = RunFolder(orphan.settings[0].removeprefix("storage.root="), orphan.run).config
    with limited(_STORE_SECONDS):
        config = from_yaml(storage.read_text(uri), overrides=orphan.settings, origin=uri)
    _finish(config, orphan.run, "CANCELED")


def _finish(
    config: Config, run: str, state: str, *, kfp: KfpRun | None = None, namespace: str | None = None
) -> list[str]:
    # MLflow takes seconds to import, and usually there is nothing to close.
    from ncsn.steps import finish

    with limited(_STORE_SECONDS):
        return finish.run(config, run=run, state=state, kfp=kfp, namespace=namespace).cancelled
