"""Runs one step in this process, or the pipeline in a process that this one supervises."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout
from rich.console import Console

from ncsn import storage
from ncsn.cli.console import ProgressView, console_on, quiet_libraries
from ncsn.cli.options import TERMINATED, stop_cleanly_on_sigterm
from ncsn.cli.supervisor import Supervisor
from ncsn.cli.target import Target
from ncsn.cli.views import describe_result, print_summary
from ncsn.config import Config, to_json
from ncsn.errors import UserError
from ncsn.process import require_same_python
from ncsn.runs.folder import RunFolder, claim_run, run_folder
from ncsn.runs.inputs import default_checkpoint, find_inputs
from ncsn.runs.progress import read_progress
from ncsn.runs.records import StepRecord, read_result, read_results, recorded
from ncsn.runs.steps import CONTINUING, STEPS, STEPS_ELSEWHERE
from ncsn.storage.heartbeat import Lease

_POLL_SECONDS = 0.5


def run_step(
    step: str,
    target: Target,
    *,
    given: Mapping[str, str | None],
    as_json: bool,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Run one step in this process and print its result; `settings` are its other arguments."""
    values = perform_step(step, target, given=given, settings=settings)
    click.echo(json.dumps(values, indent=1) if as_json else describe_result(step, values))


def perform_step(
    step: str, target: Target, *, given: Mapping[str, str | None], settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run one step in this process; the plain values of its result."""
    folder = run_folder(target.config, target.run)
    settings = settings or {}
    _require_valid(step, target.config, folder)
    inputs = find_inputs(folder, step, given, config=target.config)
    lease = given.get("lease")
    leased = {"lease": lease} if lease else {}
    log = work_folder(folder) / "steps" / step / "log.txt" if sys.stderr.isatty() else None
    # A step with a launcher needs no lock: the launcher's lock, or the name of the job, is one.
    with nullcontext() if leased else _alone(folder, step), quiet_libraries(log) as console:
        console.print(f"run {target.run}" + (f"   log {log}" if log else ""), soft_wrap=True)
        if "checkpoint" in inputs and not given.get("checkpoint"):
            _say_if_selected(console, folder, inputs["checkpoint"])
        storage.delete_file(folder.step(step, "progress.json"))
        # Without a terminal, the log of a step elsewhere is printed as it comes, with these lines in it.
        in_log = target.config.compute.backend != "local" and step in STEPS_ELSEWHERE and not console.is_terminal
        with ProgressView(console) as view, _shown_progress(folder, step, view, watched=not in_log):
            module = importlib.import_module(f"ncsn.steps.{step}")
            with recorded(target.config, target.run, step), _interruption_by_ray():
                if lease:  # the cluster may retry a job whose launcher is gone
                    Lease(lease).require("nothing was started")
                require_same_python()
                result = module.run(target.config, run=target.run, **inputs, **leased, **settings)
    values: dict[str, Any] = dataclasses.asdict(result)
    return values


def select_best(target: Target, *, given: Mapping[str, str | None], as_json: bool, only_choose: bool) -> None:
    """Choose the best checkpoint of a run; then sample, evaluate and register it, and report, unless `only_choose`."""
    found = {"select": perform_step("select", target, given=given)}
    if not as_json:
        click.echo(describe_result("select", found["select"]))
    if not only_choose:
        sampling = target.config.sampling.model_copy(update={"relative_width": None})  # that of the chosen weights
        chosen = replace(target, config=target.config.model_copy(update={"sampling": sampling}))
        inputs: dict[str, str | None] = {"dataset": given.get("dataset"), "checkpoint": found["select"]["checkpoint"]}
        for step, name in (("sample", "samples"), ("evaluate", "evaluation"), ("register", ""), ("report", "")):
            found[step] = perform_step(step, chosen, given=inputs)
            if name:
                inputs[name] = found[step]["uri"]
            if not as_json:
                click.echo(describe_result(step, found[step]))
    if as_json:
        click.echo(json.dumps(found["select"] if only_choose else found, indent=1))


def _say_if_selected(console: Console, folder: RunFolder, checkpoint: str | None) -> None:
    chosen = read_result(folder, "select")
    if chosen is not None and chosen.result["checkpoint"] == checkpoint:
        console.print(f"checkpoint {checkpoint}, chosen by `ncsn select`", soft_wrap=True)


def _require_valid(step: str, config: Config, folder: RunFolder) -> None:
    """What the step refuses too, but before its inputs are looked for and the run's name is claimed."""
    _require_start(config, folder)
    if step == "tune":
        from ncsn.config.search import require_search

        require_search(config)


def _require_start(config: Config, folder: RunFolder) -> None:
    if config.train.init_from is not None:
        from ncsn.steps.start import require_start

        require_start(config, folder)


def run_pipeline(target: Target, *, as_json: bool) -> None:
    """Run the steps that are not done, through KFP on one Ray cluster, and print the summary."""
    from ncsn.tracking.client import tracking_uri

    config = target.config
    if config.search is not None:
        raise UserError(
            "search",
            "`ncsn run` does not search",
            hint="run `ncsn tune` with the same options, then `ncsn run --config` with the best.yaml that it names; "
            "or leave the search out with --set search=null",
        )
    tracking_uri(config)  # raises now, not in the second step
    _require_start(config, run_folder(config, target.run))
    folder = claim_run(config, target.run)
    before = read_results(folder)
    records = complete_records(folder, config)
    if records is None:
        with _alone(folder, "run"):
            records = _execute(config, folder)
    if as_json:
        results = {step: record.result for step, record in records.items()}
        click.echo(json.dumps({"run": target.run, "uri": folder.uri, "steps": results}, indent=1))
    else:
        earlier = [step for step, record in records.items() if record == before.get(step)]
        print_summary(console_on(sys.stdout), folder, config, records, earlier=earlier)


def _execute(config: Config, folder: RunFolder) -> dict[str, StepRecord]:
    for step in STEPS:
        storage.delete_file(folder.step(step, "progress.json"))
    work = work_folder(folder)
    with quiet_libraries(work / "pipeline.log") as console, ProgressView(console) as view:
        supervisor = Supervisor(folder, work, view)
        console.print(f"run    {folder.uri}\nlog    {supervisor.log}", soft_wrap=True)
        _say_if_selected(console, folder, _sampled_next(folder, config))
        with _interruption_by_ray(), _cluster(config) as address:
            console.print(f"ray    {address}", soft_wrap=True)
            supervisor.run(to_json(config))
    return mark_complete(folder, config)


def _sampled_next(folder: RunFolder, config: Config) -> str | None:
    """The checkpoint of the run to sample from; None while it is not trained."""
    trained = read_result(folder, "train")
    return None if trained is None else default_checkpoint(folder, config, last=str(trained.result["checkpoint"]))


def mark_complete(folder: RunFolder, config: Config) -> dict[str, StepRecord]:
    """Record that the whole pipeline of this config is done; returns the records of its steps."""
    records = read_results(folder)
    mark = {
        "of": _circumstances(folder, config),
        "finished_at": {step: record.finished_at for step, record in records.items()},
    }
    storage.write_json(folder.complete, mark, indent=1)
    return records


def complete_records(folder: RunFolder, config: Config) -> dict[str, StepRecord] | None:
    """The records of the steps if the pipeline is done for this config and nothing was changed or lost since."""
    mark = storage.find_json(folder.complete)
    if mark is None or mark["of"] != _circumstances(folder, config):
        return None
    records = read_results(folder)
    if {step: record.finished_at for step, record in records.items()} != mark["finished_at"]:
        return None
    values = [value for record in records.values() for value in record.result.values()]
    outputs = [value for value in values if isinstance(value, str) and value.startswith(f"{folder.root}/")]
    return records if all(map(storage.exists, outputs)) else None


def _circumstances(folder: RunFolder, config: Config) -> dict[str, str]:
    """The inputs of a run other than the results of its steps."""
    from ncsn.data.sources.listing import source_fingerprint
    from ncsn.tracking.client import shown, tracking_uri

    selected = _sampled_next(folder, config) if read_result(folder, "select") else None
    return {
        "config": to_json(config),
        "files": source_fingerprint(config.data),
        "registry": shown(tracking_uri(config)),
        **({"checkpoint": selected} if selected else {}),
    }


def _cluster(config: Config) -> AbstractContextManager[str]:
    """The Ray cluster that the steps join; none where each step is a job."""
    if config.compute.backend != "local":
        return nullcontext(f"one job per step ({config.compute.backend})")
    from ncsn.distributed.cluster import ray_cluster

    return ray_cluster(config)


@contextmanager
def _interruption_by_ray() -> Iterator[None]:
    """End with `TERMINATED` after SIGTERM and with KeyboardInterrupt after Ctrl-C, whatever Ray makes of them."""
    # Ray Train answers Ctrl-C with exit code 0 or 1, and a wait for Ray makes 1 of any exit code. During the work of a
    # cluster its backend answers SIGTERM, with the same code.
    told = stop_cleanly_on_sigterm()
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as stop:
        if told.is_set() or (isinstance(stop, SystemExit) and stop.code == TERMINATED):
            sys.exit(TERMINATED)
        raise KeyboardInterrupt from stop


@contextmanager
def _shown_progress(folder: RunFolder, step: str, view: ProgressView, *, watched: bool) -> Iterator[None]:
    """Show when the step starts and ends, and if `watched` the progress that it publishes."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            progress = read_progress(folder, step)
            if progress is not None:
                view.update(step, progress)

    started = time.monotonic()
    view.start(step)
    watcher = threading.Thread(target=watch, daemon=True)
    if watched:
        watcher.start()
    try:
        yield
    finally:
        ended.set()
        if watched:
            watcher.join()
    view.finish(step, f"done in {time.monotonic() - started:,.1f} s")


@contextmanager
def _alone(folder: RunFolder, step: str) -> Iterator[None]:
    """Refuse to train one run twice at once: both would write the same checkpoints."""
    # The kernel frees the lock when its process ends, however it ends. A store that is not local has no lock.
    if step not in CONTINUING or not storage.is_local(folder.uri):
        yield
        return
    path = Path(folder.uri) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise UserError(
            "--run", "running in another process", hint="wait for it, or choose another --run NAME", value=folder.run
        ) from None
    with lock:
        yield


def serve_ui(config: Config, *, host: str, port: int) -> None:
    """Replace this process by the MLflow server."""
    from ncsn.tracking.client import runs_page, server_command

    command = server_command(config, host=host, port=port)
    _require_free(host, port)  # MLflow's server exits with 0 if it cannot listen
    click.echo(runs_page(config, served=f"http://{host}:{port}"), err=True)
    os.execv(command[0], command)  # noqa: S606


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0].lower()
        if error.errno == errno.EADDRINUSE:
            raise UserError("--port", "in use", hint="choose another --port", value=port) from None
        if error.errno == errno.EACCES:
            raise UserError("--port", reason, hint="choose another --port", value=port) from None
        raise UserError("--host", reason, hint="use an address of this machine", value=host) from None


def work_folder(folder: RunFolder) -> Path:
    """Local folder for the log and KFP's files: the run's own, or below `.ncsn` if the store is not local."""
    if storage.is_local(folder.uri):
        return Path(folder.uri)
    return Path(".ncsn").absolute() / "runs" / folder.run
