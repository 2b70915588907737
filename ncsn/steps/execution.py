"""The one way to run a step, for `ncsn <step>`, `ncsn run` and the tasks of KFP."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.util import find_spec
from typing import Any

from ncsn import storage
from ncsn.config import Config
from ncsn.config.search import require_search
from ncsn.errors import UserError
from ncsn.events import tell
from ncsn.process import CODE, KFP_RUN_ID, TERMINATED, require_same_python, this_kfp_run
from ncsn.runs.code import require_packages
from ncsn.runs.folder import (
    STOPPED,
    Outcome,
    RunFolder,
    find_inputs,
    folders_of,
    read_mistake,
    read_step,
    recorded,
    run_folder,
    state_after,
    update_step,
    write_outcome,
)
from ncsn.runs.steps import PIPELINE, STEPS, STEPS_ELSEWHERE, TUNE
from ncsn.steps.step import launch
from ncsn.storage.heartbeat import LeaseExpired, is_abandoned
from ncsn.tracking.client import tracking_uri

# Variable of KFP's: how often this task was tried before. KFP's own Retry counts from 0 again.
_TRY = "KFP_RETRY_INDEX"
_LOOK_SECONDS = 10.0
# Gets step, folder and inputs: what the caller has around the work of a step, such as a lock or a console.
Around = Callable[[str, RunFolder, Mapping[str, str]], AbstractContextManager[object]]


def run_step(
    step: str,
    config: Config,
    *,
    run: str,
    given: Mapping[str, str | None],
    lease: str | None = None,
    around: Around = lambda *_: nullcontext(),
    options: Mapping[str, Any] = {},
) -> Any:
    """Do a step, or find its result, which is a frozen dataclass; an error is recorded.

    `given` are URIs of inputs; those that lack are the run's own. `lease` is the URI of a launcher's heartbeat.
    `options` are for the function of this step alone.
    """
    folder = run_folder(config, run)
    with recorded(config, run, step) if lease else nullcontext():  # a launcher reads there what its driver refuses
        require_packages()
        preflight(step, config, folder)
        inputs = find_inputs(folder, step, given, config=config)
    options = options or images_of_run(step, config, folder)
    with around(step, folder, inputs), recorded(config, run, step):
        record, code = read_step(folder, step), os.environ.get(CODE)
        reads = {**inputs, "code": code} if code else inputs
        request = record.request if lease or config.compute.backend != "local" else ""  # no launcher asks for work here
        if (record.reads, record.request) != (reads, request):  # cleanup spares what is read, days before a result
            update_step(folder, step, reads=reads, request=request)
        leased = {}
        if lease:
            if is_abandoned(lease):  # the cluster may retry a job whose launcher is gone
                raise LeaseExpired(f"no launcher renews a lease in {lease}: nothing was started")
            require_same_python()
            leased = {"lease": lease}
        elif step in STEPS_ELSEWHERE and config.compute.backend != "local" and find_spec("torch") is None:
            return launch(step, config, run, inputs)
        return importlib.import_module(f"ncsn.steps.{step}").run(config, run=run, **inputs, **leased, **options)


def images_of_run(step: str, config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """The option of the first step, before the store is changed: `ForeignRun` if the run has read other images."""
    if step != STEPS[0] or not read_step(folder, step).result:
        return {}
    from ncsn.steps.ingest import agreed_inputs  # loads NumPy and Arrow

    return {"inputs": agreed_inputs(config, folder)}


def run_all(config: Config, *, run: str, around: Around, options: Mapping[str, Mapping[str, Any]] = {}) -> None:
    """Do the steps of a run that are not done, with a search first if the config has one; and write how it ended."""
    given: dict[str, str | None] = {}
    whole, folders = config, [run_folder(config, run)]
    storage.delete(folders[0].status)  # the run has not ended
    try:
        for step in STEPS if config.search is None else PIPELINE:
            result = run_step(step, config, run=run, given=given, around=around, options=options.get(step, {}))
            if step == STEPS[0]:
                given["dataset"] = result.uri
            elif step == TUNE:
                from ncsn.steps.tune import trainable

                config, run = trainable(result, config), result.run
                folders.append(run_folder(config, run))
                storage.delete(folders[-1].status)
    except BaseException as error:
        _write_end(whole, folders, step, error)
        raise
    for folder in folders:
        write_outcome(folder, Outcome("FINISHED"))


def _write_end(config: Config, folders: Sequence[RunFolder], step: str, error: BaseException) -> None:
    """Make the error of a step in the last of the runs the outcome of all; a finished run that is stopped keeps its."""
    with suppress(OSError):  # an unreachable store must not hide the first error
        told = read_step(folders[-1], step).error  # by the driver, perhaps, who knew more
        outcome = Outcome(state_after(error), told.message if told else STOPPED.get(type(error), str(error)), step)
        steps = folders_of(folders[0], config).items()
        if outcome.status == "KILLED" and all(read_step(of, each).state == "FINISHED" for each, of in steps):
            outcome = Outcome("FINISHED")  # no step has begun to work again
        for folder in folders:
            write_outcome(folder, outcome)


def preflight(step: str, config: Config, folder: RunFolder) -> None:
    """Refuse what can be refused before the name of the run is claimed and anything is read or started."""
    tracking_uri(config)
    if step == TUNE:
        require_search(config)
    if step in STEPS_ELSEWHERE and config.compute.backend == "kuberay" and storage.is_local(folder.uri):
        raise UserError(
            "storage.root",
            "a folder of this machine, which the pods of a cluster cannot reach",
            hint="use s3://BUCKET/PREFIX",
            value=config.storage.root,
        )
    if step in (TUNE, "train") and config.train.init_from is not None:
        from ncsn.steps.train import require_start  # loads torch

        require_start(config, folder)


def run_kfp_task(step: str, config: Config, *, run: str, given: Mapping[str, str], last: bool = False) -> Any:
    """The result of a task's step; its failure, or the end of the `last` step, becomes the outcome of the run."""
    folder = run_folder(config, run)
    try:
        options = images_of_run(step, config, folder)
    except UserError as refusal:
        if kfp_run := os.environ.get(KFP_RUN_ID):  # for the exit handler, which leaves the run as it is too
            storage.write_text(folder.step(step, f"refused-{kfp_run}"), str(refusal))
        raise
    # The exit handler writes the same outcome again, but after KFP's Retry there is none.
    before = read_step(folder, step).error
    tried = bool(int(os.environ.get(_TRY) or 0)) and before is not None and before.kfp_run == os.environ.get(KFP_RUN_ID)
    mistake = read_mistake(folder, step) if tried else None  # another try would only repeat it
    with recorded(config, run, step):
        if mistake is not None:
            raise mistake
        first = step == STEPS[0]
        if this_kfp_run() is not None:  # then there is a cluster, whose client takes a while to import
            from ncsn.steps.janitor import note_run

            first = note_run(config, run)
        if first:
            tell("started", run=run, root=folder.root)
        storage.delete(folder.status)  # the run has not ended
        try:
            result = run_step(step, config, run=run, given=given, options=options)
        except Exception as error:
            if _terminated():  # the janitor may delete a RayJob before Argo ends this process
                update_step(folder, step, state="KILLED")
                raise SystemExit(TERMINATED) from error
            _write_end(config, [folder], step, error)
            raise
        if last:
            write_outcome(folder, Outcome("FINISHED"))
        return result


def _terminated() -> bool:
    """Whether a person has ended the pipeline run of this process."""
    here = this_kfp_run()
    if here is None:
        return False
    from ncsn.remote.kubernetes import KubernetesApi, was_stopped

    try:
        return was_stopped(KubernetesApi(patience=_LOOK_SECONDS).get("workflows", here.workflow))
    except (OSError, UserError):
        return False
