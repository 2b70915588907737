"""The one way to run a step: `ncsn run`, `ncsn <step>`, a task of KFP and the driver of a job elsewhere call `execute`.

A step is a line in the table of `ncsn.runs.steps`, which says what it reads and where it runs, and the module
`ncsn.steps.<name>` with `prepare`, which settles what decides the result and returns the work. It is idempotent: asked
again for the same, it returns the stored result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ncsn import storage
from ncsn.config import Config
from ncsn.config.rules import require_splits
from ncsn.environment import CODE
from ncsn.errors import NotFound, UserError, require_module
from ncsn.progress import PublishedProgress
from ncsn.runs.code import require_packages, require_same_python
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import (
    Attempt,
    Finished,
    ForeignRun,
    has_other_job,
    read_attempt,
    read_finished,
    record_failure,
    update_attempt,
    version_of,
    write_result,
)
from ncsn.runs.run import Run, find_inputs, state_to_continue
from ncsn.runs.steps import SEARCH, STEP_TABLE, Step
from ncsn.steps.prepared import Context, Prepared
from ncsn.storage.heartbeat import LeaseExpired, is_abandoned
from ncsn.tracking.client import tracking_uri


class Observer:
    """Is told about the steps of a run; this class tells nobody."""

    def started(self, step: str, run: Run, inputs: Mapping[str, str]) -> None:
        """A step begins, with these URIs of inputs."""

    def begun(self, run: Run) -> None:
        """Its work begins, here or by a job that was accepted; not if the result is there."""

    def ended(self, step: str, run: Run, *, again: bool) -> None:
        """It has its result; `again` if that was there before."""

    def failed(self, step: str, run: Run, error: BaseException) -> None:
        """It was refused, has failed or was interrupted, and its record says so."""


def execute(
    step: str,
    run: Run,
    observer: Observer = Observer(),  # noqa: B008 - has no state
    *,
    given: Mapping[str, str | None] = {},
    lease: str | None = None,
    **options: Any,
) -> Any:
    """Do a step, or find its result, which is one of `ncsn.runs.results`; an error is recorded.

    `given` are URIs of inputs; those that lack are the run's own. `lease` is the URI of a launcher's heartbeat.
    `options` are for the `prepare` of this step alone.
    """
    declared, folder, config = STEP_TABLE[step], run.folder, run.config
    there = bool(declared.workers) and config.compute.backend != "local" and not options
    if lease:
        run.claim()  # a launcher reads in the record what its driver refuses
    before, claimed = read_attempt(folder, step), run.claimed
    # The request whose work this attempt has begun or waits for, "" without a launcher; None until then. A driver's
    # lease is named after it.
    begun = lease.rpartition("/")[2] if lease else None

    def begin(request: str, known: Attempt | None = None) -> None:
        """Make the record this attempt's; a launcher that `known` it changes nothing if the driver was faster."""
        nonlocal begun
        begun, now = request, read_attempt(folder, step)
        if known and now.request == request and (now != known or now.state in {"RUNNING", "FINISHED"}):
            return
        observer.begun(run)
        update_attempt(folder, step, state="RUNNING", error=None, reads=reads, request=request)
        storage.delete(folder.step(step, "progress.json"))  # of an earlier attempt

    try:
        require_possible(step, run)
        inputs = find_inputs(folder, step, given)
        _require_shared(declared, config, {f"--{name}": uri for name, uri in inputs.items()})
        # A step with a launcher needs no lock: the launcher's lock, or the name of the job, is one.
        with run.alone() if declared.continues and lease is None else nullcontext():
            run.claim()
            claimed = True
            observer.started(step, run, inputs)
            # What the step reads, which cleanup spares, days before there is a result.
            reads = {**inputs, "code": os.environ[CODE]} if CODE in os.environ else inputs
            if lease and begun is not None:
                begin(begun)
                _require_launcher(lease)
            key = None
            if there and find_spec("torch") is None:  # as in the slim image: the driver prepares
                found = _answered(step, run, inputs)
            else:
                module = import_module(declared.module or f"ncsn.steps.{step}")
                prepared: Prepared[Any] = module.prepare(run, **inputs, **options)
                config, key = prepared.config, json.loads(json.dumps(prepared.key))
                found = _found(declared, folder, prepared, key, begun)
            if found:
                result = found.result
            elif there:
                from ncsn.steps.elsewhere import do_elsewhere

                result = do_elsewhere(step, run, config, inputs, key, begin)
            else:
                begin(begun or "")
                result = _work(step, run, prepared, lease)
                # With all of the attempt: another process may do the step for other inputs.
                write_result(folder, result, key=key or {}, reads=reads, request=begun)
    except BaseException as error:
        if claimed and not isinstance(error, ForeignRun):  # else the records are perhaps another's
            record_failure(folder, step, error, before=before, request=begun)
        observer.failed(step, run, error)
        raise
    observer.ended(step, run, again=found is not None)
    return result


def _work(step: str, run: Run, prepared: Prepared[Any], lease: str | None) -> Any:
    """Do the step in this process, with its MLflow run."""
    from ncsn.tracking.mlflow_runs import step_run  # loads MLflow, for seconds

    folder = run.folder
    progress = PublishedProgress(folder.step(step, "progress.json"), lease=lease)
    with step_run(prepared.config, run=run.name, step=step) as tracked:
        return prepared.work(Context(folder, progress, tracked, lease, folder.step(step, "workers.txt")))


def _require_launcher(lease: str) -> None:
    """End a driver whose launchers are gone, since the cluster may retry its job, or have another Python."""
    if is_abandoned(lease):
        raise LeaseExpired(f"no launcher renews a lease in {lease}: nothing was started")
    require_same_python()


def require_possible(step: str, run: Run) -> None:
    """Refuse what can be known to fail from the config, this machine and a few small objects of the store.

    It changes nothing, so that a command asks it of all steps before the name of the run is claimed.
    """
    declared, config, folder = STEP_TABLE[step], run.config, run.folder
    require_packages()
    tracking_uri(config)
    if step == SEARCH and config.search is None:
        hint = "add this section, or pass --set search.num_trials=16 for a search with defaults"
        raise UserError("search", "missing", hint=hint)
    if step == SEARCH:
        require_module("optuna")
    if step == "evaluate":
        require_splits(config)
    if declared.workers and config.compute.backend == "kuberay":
        require_module("kubernetes")
    _require_shared(declared, config, {"storage.root": config.storage.root})
    if not declared.continues:
        return
    if model := version_of(folder):
        hint = f"start another run from it: train.init_from={model}"
        raise UserError("--run", f"is {model}, whose training is done", hint=hint, value=run.name)
    here = config.compute.backend == "local" and "RAY_ADDRESS" not in os.environ
    if here and step == (SEARCH if config.search else "train") and read_finished(folder, step) is None:
        from ncsn.distributed.cluster import require_machine  # loads Ray

        require_machine(config.compute)
    if not storage.exists(folder.config):
        if config.train.continue_from is not None:
            state_to_continue(config)
        elif config.train.init_from is not None:
            from ncsn.steps.address import start_place  # loads MLflow for a version

            start_place(config)


def _require_shared(declared: Step, config: Config, uris: Mapping[str, str]) -> None:
    """Refuse the first of these that the pods of a step cannot reach, by its key."""
    if declared.workers and config.compute.backend == "kuberay":
        for key, uri in uris.items():
            if storage.is_local(uri):
                reason = "a folder of this machine, which the pods of a cluster cannot reach"
                raise UserError(key, reason, hint="use s3://BUCKET/PREFIX", value=uri)


def _found(
    declared: Step, folder: RunFolder, prepared: Prepared[Any], key: Mapping[str, Any], begun: str | None
) -> Finished | None:
    """The stored result of this key. What took hours of training is not done again for a missing file."""
    step, finished = declared.name, read_finished(folder, declared.name)
    if finished is None or finished.key != key or not prepared.stands(finished.result):
        return None
    missing = next((uri for uri in prepared.files(finished.result) if not storage.exists(uri)), None)
    if missing is not None:
        if declared.continues:
            reason = f"it is gone, but the step {step} of run {folder.run!r} has finished"
            place = folder.step(step, "result.json")
            raise NotFound(missing, reason, hint=f"restore it, or delete {place} to {step} again")
        return None
    attempt = read_attempt(folder, step)
    # A later attempt had another key.
    if attempt.state != "FINISHED" and not has_other_job(folder, step, attempt, begun):
        update_attempt(folder, step, state="FINISHED", error=None)
    return finished


def _answered(step: str, run: Run, inputs: Mapping[str, str]) -> Finished | None:
    """What a launcher without torch has had as the answer to the same request, if its files are still there."""
    from ncsn.steps.elsewhere import remote_step

    attempt, finished = read_attempt(run.folder, step), read_finished(run.folder, step)
    same = attempt.state == "FINISHED" and attempt.request == remote_step(step, run, run.config, inputs).request
    if finished is None or not same:
        return None
    files = [uri for uri in finished.values.values() if str(uri).startswith(f"{run.folder.root}/")]
    return finished if all(map(storage.exists, files)) else None
