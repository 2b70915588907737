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
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ncsn import storage
from ncsn.config import Config
from ncsn.config.rules import require_splits
from ncsn.environment import CODE, require_same_python, utc_now
from ncsn.errors import NotFound, UserError, require_module
from ncsn.progress import PublishedProgress
from ncsn.runs.code import require_packages
from ncsn.runs.folder import (
    ForeignRun,
    Run,
    RunFolder,
    StepRecord,
    find_inputs,
    has_other_job,
    opened_from,
    read_step,
    record_failure,
    state_to_continue,
    update_step,
)
from ncsn.runs.steps import CONTINUING, SEARCH, STEP_TABLE, STEPS
from ncsn.steps.results import Context, Prepared, stored_result
from ncsn.storage.heartbeat import LeaseExpired, is_abandoned
from ncsn.tracking.client import tracking_uri


class Observer:
    """Is told about the steps of a run; this class tells nobody."""

    def started(self, step: str, run: Run, inputs: Mapping[str, str]) -> None:
        """A step begins, with these URIs of inputs."""

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
    """Do a step, or find its result, which is a dataclass of `ncsn.steps.results`; an error is recorded.

    `given` are URIs of inputs; those that lack are the run's own. `lease` is the URI of a launcher's heartbeat.
    `options` are for the `prepare` of this step alone.
    """
    folder, config = run.folder, run.config
    there = STEP_TABLE[step].elsewhere and config.compute.backend != "local" and not options
    if lease:
        run.claim()  # a launcher reads in the record what its driver refuses
    before, claimed, made = read_step(folder, step), run.claimed, None
    # The request whose work this attempt has begun or waits for, "" without a launcher; None until then. A driver's
    # lease is named after it.
    begun = lease.rpartition("/")[2] if lease else None

    def begin(request: str, known: StepRecord | None = None) -> None:
        """Make the record this attempt's; a launcher that `known` it changes nothing if the driver was faster."""
        nonlocal begun
        begun, now = request, read_step(folder, step)
        if known and now.request == request and (now != known or now.state in {"RUNNING", "FINISHED"}):
            return
        update_step(folder, step, state="RUNNING", error=None, reads=reads, request=request)
        storage.delete(folder.step(step, "progress.json"))  # of an earlier attempt

    try:
        refuse(step, run)
        inputs = find_inputs(folder, step, given)
        _require_shared(step, config, {f"--{name}": uri for name, uri in inputs.items()})
        # A step with a launcher needs no lock: the launcher's lock, or the name of the job, is one.
        with run.alone() if step in CONTINUING and lease is None else nullcontext():
            if not run.claimed:
                run.claim()
            claimed = True
            observer.started(step, run, inputs)
            code = os.environ.get(CODE)
            # What the step reads, which cleanup spares, days before there is a result.
            reads = {**inputs, "code": code} if code else inputs
            if begun is not None:
                begin(begun)
            if lease:
                if is_abandoned(lease):  # the cluster may retry a job whose launcher is gone
                    raise LeaseExpired(f"no launcher renews a lease in {lease}: nothing was started")
                require_same_python()
            if there and find_spec("torch") is None:  # as in the slim image: the driver prepares
                key, found = None, _is_answered(step, run, inputs)
            else:
                prepared = import_module(f"ncsn.steps.{step}").prepare(run, **inputs, **options)
                config, key = prepared.config, json.loads(json.dumps(prepared.key))
                found = _is_done(step, folder, prepared, key, begun)
            if there and not found:
                from ncsn.steps.elsewhere import do_elsewhere

                do_elsewhere(step, run, config, inputs, key, begin)
            elif not found:
                from ncsn.tracking.mlflow_runs import step_run  # loads MLflow, for seconds

                begin(begun or "")
                progress = PublishedProgress(folder.step(step, "progress.json"), lease=lease)
                with step_run(config, run=run.name, step=step) as tracked:
                    made = prepared.work(Context(folder, progress, tracked, lease, folder.step(step, "workers.txt")))
                finished = {"state": "FINISHED", "error": None, "finished_at": utc_now()}
                # All of it: another process may do the step for other inputs.
                update_step(folder, step, inputs=key, result=asdict(made), reads=reads, request=begun, **finished)
            result = made or stored_result(folder, step, key)
    except BaseException as error:
        if claimed and not isinstance(error, ForeignRun):  # else the records are perhaps another's
            record_failure(folder, step, error, before=before, request=begun)
        observer.failed(step, run, error)
        raise
    observer.ended(step, run, again=read_step(folder, step).finished_at == before.finished_at)
    return result


def refuse(step: str, run: Run) -> None:
    """Refuse what can be refused before the name of the run is claimed and anything is read or started."""
    config, folder = run.config, run.folder
    require_packages()
    tracking_uri(config)
    if step == SEARCH and config.search is None:
        hint = "add this section, or pass --set search.num_trials=16 for a search with defaults"
        raise UserError("search", "missing", hint=hint)
    if step == SEARCH:
        require_module("optuna")
    if step in (SEARCH, "train") and (model := opened_from(folder)):
        hint = f"start another run from it: train.init_from={model}"
        raise UserError("--run", f"is {model}, whose training is done", hint=hint, value=run.name)
    if step == "evaluate":
        require_splits(config)
    if STEP_TABLE[step].elsewhere and config.compute.backend == "kuberay":
        require_module("kubernetes")
    _require_shared(step, config, {"storage.root": config.storage.root})
    here = config.compute.backend == "local" and "RAY_ADDRESS" not in os.environ
    if here and step == (SEARCH if config.search else "train") and not read_step(folder, step).result:
        from ncsn.distributed.cluster import require_machine  # loads Ray

        require_machine(config.compute)
    if config.train.continue_from is not None and not storage.exists(folder.config):
        state_to_continue(config)
    if step in (SEARCH, "train") and config.train.init_from is not None and find_spec("torch"):
        from ncsn.steps.train import require_start  # loads torch

        require_start(config, folder)
    if step == STEPS[0] and run.images is None and read_step(folder, step).result:
        from ncsn.steps.ingest import agreed_inputs  # loads NumPy and Arrow

        run.images = agreed_inputs(run)


def _require_shared(step: str, config: Config, uris: Mapping[str, str]) -> None:
    """Refuse the first of these that the pods of a step cannot reach, by its key."""
    if STEP_TABLE[step].elsewhere and config.compute.backend == "kuberay":
        for key, uri in uris.items():
            if storage.is_local(uri):
                reason = "a folder of this machine, which the pods of a cluster cannot reach"
                raise UserError(key, reason, hint="use s3://BUCKET/PREFIX", value=uri)


def _is_done(step: str, folder: RunFolder, prepared: Prepared[Any], key: Mapping[str, Any], begun: str | None) -> bool:
    """Whether there is a result for this key. What took hours of training is not done again for a missing file."""
    result = stored_result(folder, step, key)
    if result is None or not prepared.holds(result):
        return False
    missing = next((uri for uri in prepared.needs(result) if not storage.exists(uri)), None)
    if missing is not None and step in CONTINUING:
        reason = f"it is gone, but the step {step} of run {folder.run!r} has finished"
        raise NotFound(missing, reason, hint=f"restore it, or delete {folder.step(step, 'step.json')} to {step} again")
    record = read_step(folder, step)
    # A later attempt had another key.
    if missing is None and record.state != "FINISHED" and not has_other_job(folder, step, record, begun):
        update_step(folder, step, state="FINISHED", error=None)
    return missing is None


def _is_answered(step: str, run: Run, inputs: Mapping[str, str]) -> bool:
    """Whether a launcher without torch has had the answer to the same request, whose files are still there."""
    from ncsn.steps.elsewhere import remote_step

    record = read_step(run.folder, step)
    files = [uri for uri in record.result.values() if str(uri).startswith(f"{run.folder.root}/")]
    same = record.state == "FINISHED" and record.request == remote_step(step, run, run.config, inputs).request
    return same and bool(record.result) and all(map(storage.exists, files))
