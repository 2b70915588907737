"""The janitor: ends and closes what pipeline runs leave behind that ended without a word.

The tasks of a terminated or deleted pipeline run have less than a second to stop, and its exit handler may never start.
So a RayJob without a driver may wait for its quota and an MLflow run be open, and the janitor looks for both at
intervals. Of a RayJob without a Workflow it reads the launchers' leases. (A driver ends by them itself, a RayJob by its
limits of time.)

A task notes its run in the ConfigMap `ncsn-runs`. Neither Argo's Workflow, which may be deleted at any time, nor a
RayJob, which not every run has, tells the janitor later which run of which store to close.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from pydantic_core import from_json

from ncsn import storage
from ncsn.config import Config, from_yaml, to_json
from ncsn.config.load import ADDRESSES
from ncsn.environment import KfpRun, this_kfp_run
from ncsn.errors import InvalidValue, UserError
from ncsn.progress import say
from ncsn.remote.kuberay import NOTES, JobState
from ncsn.remote.kubernetes import KubernetesApi, Resource, is_ending, is_over, owner_of, was_stopped
from ncsn.remote.manifest import RUN_LABEL, STEP_LABEL, selector
from ncsn.runs.layout import RunFolder, run_folder
from ncsn.runs.record import read_outcome
from ncsn.storage.heartbeat import LEASE_SECONDS, is_abandoned
from ncsn.storage.retry import limited

_STORE_SECONDS = 20.0
_NOTE_SECONDS = 10.0
_NOTE_BYTES = 8 << 10  # at most; that of a config with nearly every setting has 4,600
_STORE_SETTING = "storage.root="  # of a RayJob's command


@dataclass(frozen=True)
class Action:
    """Something that was done, or would be."""

    verb: str  # delete, close or ignore
    what: str  # the rest of the sentence
    error: Exception | None = None  # why it could not be done


@dataclass(frozen=True)
class NotedRun(KfpRun):
    """A pipeline run that a task noted: the run in the store, and the experiment as canonical JSON."""

    run: str
    config: str

    @classmethod
    def of(cls, name: str, note: str) -> NotedRun:
        """`InvalidValue`, TypeError or ValueError for a note that no task has written."""
        if len(note.encode(errors="replace")) > _NOTE_BYTES:
            raise InvalidValue(f"has more than {_NOTE_BYTES:,} bytes")
        noted = cls(id=name, **from_json(note))  # which refuses deep nesting with a ValueError
        if not all(isinstance(each, str) for each in vars(noted).values()):
            raise InvalidValue("holds something else than text")
        _ = noted.folder
        return noted

    @property
    def folder(self) -> RunFolder:
        """Equal for pipeline runs that work on the same run."""
        return run_folder(_taken(self.config), self.run)


def note_run(config: Config, run: str) -> bool:
    """Tell the janitor which run to close if this pipeline is stopped; whether this is the first task that does.

    The note of the first task stays.
    """
    if (here := this_kfp_run()) is not None:
        with _cluster() as api:
            if here.id not in _notes(api):
                note = json.dumps({"workflow": here.workflow, "run": run, "config": to_json(config)})
                NotedRun.of(here.id, note)  # that the janitor will read it
                _note(api, here, note)
                return True
    return False


def forget_this_run() -> None:
    if (here := this_kfp_run()) is not None:
        with _cluster() as api:
            _note(api, here, None)


@contextmanager
def _cluster() -> Iterator[KubernetesApi]:
    """The cluster; without an answer or the right, only say so."""
    try:
        yield KubernetesApi(patience=_NOTE_SECONDS)
    except (OSError, InvalidValue) as error:
        say(f"could not register this run with the janitor: {error}")


def _notes(api: KubernetesApi) -> dict[str, str]:
    return (api.get("configmaps", NOTES) or {}).get("data") or {}


def _note(api: KubernetesApi, run: KfpRun, note: str | None) -> None:
    """Keep the note of a pipeline run; None forgets it."""
    api.patch("configmaps", NOTES, {"data": {run.id: note}})


def clean_up(api: KubernetesApi, *, run: str | None = None, dry_run: bool = False) -> Iterator[Action]:
    """Delete RayJobs whose pipeline run has ended or whose launchers are gone, and close the runs that were left open.

    With `run` only what belongs to it, and its RayJobs also if their launcher lives. An action that fails does not stop
    the others.
    """

    def do(verb: str, what: str, action: Callable[[], None]) -> Action:
        try:
            if not dry_run:
                action()
        except Exception as error:  # noqa: BLE001 - the others go on
            return Action(verb, what, error)
        return Action(verb, what)

    notes = list[NotedRun]()
    for name, note in _notes(api).items():
        try:
            noted = NotedRun.of(name, note)
            _require_reached(api, noted.folder.root)
            notes.append(noted)
        except Exception as error:  # noqa: BLE001 - who may patch the ConfigMap may write anything
            yield Action("read", f"the note of {name}", error)
    workflows = {each.id: api.get("workflows", each.workflow) for each in notes}
    resumed = {each.folder for each in notes if not is_ending(workflows[each.id])}
    mine = [each for each in notes if run in (None, each.run)]
    ours = [each for each in api.find("rayjobs", labels=selector(run=run)) if RUN_LABEL in each["metadata"]["labels"]]
    working = [each for each in ours if not JobState(each).finished]
    left = [each for each in working if run or _is_left(api, each)]
    others = {each["metadata"]["labels"][RUN_LABEL] for each in working if each not in left}
    for rayjob in left:
        metadata, labels = rayjob["metadata"], rayjob["metadata"]["labels"]
        what = f"{metadata['name']}: run {labels[RUN_LABEL]}, step {labels.get(STEP_LABEL)}, {JobState(rayjob)}"
        yield do("delete", what, partial(api.delete, "rayjobs", metadata["name"], uid=metadata["uid"]))
        if labels[RUN_LABEL] not in others | {each.run for each in mine}:
            yield do("close", f"run {labels[RUN_LABEL]}: KILLED", partial(_close_run_of, api, rayjob))
    for each in mine:
        ended_workflow = workflows[each.id]
        if not is_ending(ended_workflow):
            continue
        if each.folder in resumed:  # the records belong to the pipeline run that continues it
            what = f"run {each.run} of {each.id}: another pipeline run continues it"
            yield do("ignore", what, partial(_note, api, each, None))
        else:
            what = f"run {each.run}: pipeline run {each.id}: {_state_of(ended_workflow)}"
            yield do("close", what, partial(_close, api, each, ended_workflow))


def _is_left(api: KubernetesApi, rayjob: Resource) -> bool:
    """Whether its pipeline run has ended; without one, whether no launcher is alive. False if the store is away."""
    if workflow := owner_of(rayjob).get("name"):
        return is_ending(api.get("workflows", workflow))
    # A running driver ends by itself, and needs time to save.
    seconds = LEASE_SECONDS * (2 if JobState(rayjob).deployment == "Running" else 1)
    with suppress(OSError, UserError, ValueError, LookupError), limited(_STORE_SECONDS):  # or it is not of ncsn
        words = shlex.split(rayjob["spec"]["entrypoint"])
        lease = words[words.index("--lease") + 1]
        _require_reached(api, lease)
        return is_abandoned(lease, seconds=seconds)
    return False


def _require_reached(api: KubernetesApi, uri: str) -> None:
    """Refuse a folder, unless of a pod's volume: who makes notes and RayJobs has no say where this machine writes."""
    if storage.is_local(uri) and not api.in_pod:
        raise UserError("storage.root", "a folder of a pod, not of this machine", hint="ask in that pod", value=uri)


def _state_of(workflow: Resource | None) -> str:
    if workflow is None or was_stopped(workflow):
        return "CANCELED"
    return "SUCCEEDED" if workflow.get("status", {}).get("phase") == "Succeeded" else "FAILED"


def _close(api: KubernetesApi, noted: NotedRun, workflow: Resource | None) -> None:
    """Close the run, and forget it unless something may still run and change its MLflow run later."""
    config, state = _taken(noted.config), _state_of(workflow)
    if workflow is None:  # deleted, perhaps long after its end
        with limited(_STORE_SECONDS):
            outcome = read_outcome(run_folder(config, noted.run))
        if outcome is not None and outcome.status == "FAILED":
            _note(api, noted, None)
            return
        state = "SUCCEEDED" if outcome is not None and outcome.status == "FINISHED" else state
    # RayJobs of another namespace end by that one's janitor or by their lease.
    canceled = _finish(config, noted.run, state, kfp=KfpRun(noted.id, noted.workflow), namespace=api.namespace)
    if is_over(workflow) and not canceled:
        _note(api, noted, None)


def _close_run_of(api: KubernetesApi, rayjob: Resource) -> None:
    """Close the run of a RayJob that nobody noted; its command says which store has it."""
    words, run = shlex.split(rayjob["spec"]["entrypoint"]), rayjob["metadata"]["labels"][RUN_LABEL]
    root = next(word.removeprefix(_STORE_SETTING) for word in words if word.startswith(_STORE_SETTING))
    _require_reached(api, root)
    folder = RunFolder(root, run)
    with limited(_STORE_SECONDS):
        text = storage.read_text(folder.config)
    _finish(_taken(text, f"{_STORE_SETTING}{root}"), run, "CANCELED")


def _taken(text: str, *overrides: str) -> Config:
    """The config in a note or a record, without addresses, to which the janitor would send its own passwords."""
    return from_yaml(text, overrides=overrides, without=ADDRESSES)


def _finish(
    config: Config, run: str, state: str, *, kfp: KfpRun | None = None, namespace: str | None = None
) -> list[str]:
    # MLflow takes seconds to import, and usually there is nothing to close.
    from ncsn.kubeflow import finish

    with limited(_STORE_SECONDS):
        return finish.run(config, run=run, state=state, kfp=kfp, namespace=namespace).canceled
