"""Ends what nobody waits for any more, and tells store and MLflow how it ended.

A pipeline run that is terminated or deleted may leave a RayJob at work and an MLflow run open: its tasks have less than
a second, and its exit handler may never start. So somebody looks from outside, again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ncsn import storage
from ncsn.cluster.api import KubernetesApi
from ncsn.cluster.kfp_runs import NotedRun, forget_run, is_over, noted_runs, state_of_run
from ncsn.cluster.launcher import is_ending
from ncsn.cluster.reap import Orphan, find_orphans
from ncsn.config import Config, from_json, from_yaml
from ncsn.launched import KfpRun
from ncsn.patience import limited

_STORE_SECONDS = 20.0


@dataclass(frozen=True)
class Deed:
    """Something that was done, or would be.

    Attributes:
        verb: delete or close.
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

    noted = {each.id: each for each in noted_runs(api) if run in (None, each.run)}
    for orphan in find_orphans(api, older_than=older_than, run=run, at_work=at_work):
        yield do("delete", orphan.describe(), lambda name=orphan.name: api.delete_rayjob(name))  # type: ignore[misc]
        if orphan.config and orphan.kfp_run not in noted:
            yield do("close", f"run {orphan.run}: KILLED", lambda each=orphan: _close_orphan(each))  # type: ignore[misc]
    for each in noted.values():
        workflow = api.workflow(each.workflow)
        if is_ending(workflow):
            state, over = state_of_run(workflow), is_over(workflow)
            what = f"run {each.run}: its pipeline run {each.id} has ended {state}"
            yield do("close", what, lambda each=each, state=state, over=over: _close(api, each, state, over=over))  # type: ignore[misc]


def _close(api: KubernetesApi, noted: NotedRun, state: str, *, over: bool) -> None:
    """Close the run, and forget it unless something may still be at work: that could have the last word in MLflow."""
    cancelled = _finish(from_json(noted.config), noted.run, state, kfp=KfpRun(noted.id, noted.workflow))
    if over and not cancelled:
        forget_run(api, noted)


def _close_orphan(orphan: Orphan) -> None:
    with limited(_STORE_SECONDS):
        config = from_yaml(storage.read_text(orphan.config), origin=orphan.config)
    _finish(config, orphan.run, "CANCELED")


def _finish(config: Config, run: str, state: str, kfp: KfpRun | None = None) -> list[str]:
    # Imported here and not above: MLflow takes seconds, and most of the time there is nothing to close.
    from ncsn.steps import finish

    with limited(_STORE_SECONDS):
        return finish.run(config, run=run, state=state, kfp=kfp).cancelled
