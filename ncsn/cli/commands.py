"""What the commands do, once the options are read."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout

from ncsn import storage
from ncsn.cli.catalogue import BESIDE_THE_PIPELINE
from ncsn.cli.failures import TERMINATED, stop_cleanly_on_sigterm
from ncsn.cli.inputs import Target
from ncsn.cli.output import console_on, quiet_libraries
from ncsn.cli.progress_view import ProgressView
from ncsn.cli.records import complete_records, mark_complete
from ncsn.cli.summary import describe_result, print_summary
from ncsn.cli.supervisor import Supervisor, work_folder
from ncsn.cli.upstream import find_inputs
from ncsn.config import Config, to_json
from ncsn.errors import UserError
from ncsn.process import require_launchers_python
from ncsn.runs.folder import RunFolder, claim_run, run_folder
from ncsn.runs.records import StepRecord, forget_attempts, read_progress, recorded, stored_records
from ncsn.steps.step import STEPS_ELSEWHERE
from ncsn.storage.heartbeat import Lease

_EXCLUSIVE = ("tune", "train", "run")
_POLL_SECONDS = 0.5


def run_step(
    step: str,
    target: Target,
    *,
    given: Mapping[str, str | None],
    as_json: bool,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Run one step in this process and print its result.

    Args:
        step: Its name.
        target: The experiment and the run.
        given: Inputs that options name.
        as_json: Print JSON.
        settings: Arguments of the step that are neither config nor inputs.
    """
    folder = run_folder(target.config, target.run)
    inputs = find_inputs(folder, step, given)
    lease = given.get("lease")
    leased = {"lease": lease} if lease else {}
    log = work_folder(folder) / "steps" / step / "log.txt" if sys.stderr.isatty() else None
    # A driver that has a launcher works under its lock, which is the launcher's or the name of the job.
    with nullcontext() if leased else _alone(folder, step), quiet_libraries(log) as console:
        console.print(f"run {target.run}" + (f"   log {log}" if log else ""), soft_wrap=True)
        storage.delete_file(folder.step(step, "progress.json"))
        # The log of a driver elsewhere, which is shown as it comes, has these lines already.
        in_log = target.config.compute.backend != "local" and step in STEPS_ELSEWHERE and not console.is_terminal
        with ProgressView(console) as view, _shown_progress(folder, step, view, watched=not in_log):
            module = importlib.import_module(f"ncsn.{_package_of(step)}.{step}")
            if settings and "inject" in settings:  # a misspelled fault must not claim the run's name
                from ncsn.distributed.faults import rehearsal

                rehearsal(settings["inject"], step=step, run_uri=folder.uri)
            with _interruption_by_ray(), recorded(target.config, target.run, step):
                if lease:  # a retry by the cluster for a launcher that an earlier attempt gave up
                    Lease(lease).require("nothing was begun")
                require_launchers_python()
                result = module.run(target.config, run=target.run, **inputs, **leased, **(settings or {}))
    values = dataclasses.asdict(result)
    click.echo(json.dumps(values, indent=1) if as_json else describe_result(step, values))


def run_pipeline(target: Target, *, as_json: bool) -> None:
    """Run all steps through KFP on one Ray cluster, or find that they are done."""
    from ncsn.tracking.client import tracking_uri

    config = target.config
    if config.search is not None:
        raise UserError(
            "search",
            "`ncsn run` does not search",
            hint="run `ncsn tune` with the same options, then `ncsn run --config` with the best.yaml that it names; "
            "or leave the search out with --set search=null",
        )
    tracking_uri(config)  # raises now what the second step would find
    folder = claim_run(config, target.run)
    before = stored_records(folder)
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


def serve_ui(config: Config, *, host: str, port: int) -> None:
    """Become the MLflow server."""
    from ncsn.tracking.client import runs_page, server_command

    command = server_command(config, host=host, port=port)
    click.echo(runs_page(config, served=f"http://{host}:{port}"), err=True)
    os.execv(command[0], command)  # noqa: S606


def _execute(config: Config, folder: RunFolder) -> dict[str, StepRecord]:
    forget_attempts(folder)
    work = work_folder(folder)
    with quiet_libraries(work / "pipeline.log") as console, ProgressView(console) as view:
        supervisor = Supervisor(folder, work, view)
        console.print(f"run    {folder.uri}\nlog    {supervisor.log}", soft_wrap=True)
        with _cluster(config) as address:
            # Ray puts a handler of its own in place that aborts the process after three seconds.
            stop_cleanly_on_sigterm()
            console.print(f"ray    {address}", soft_wrap=True)
            supervisor.run(to_json(config))
    return mark_complete(folder, config)


@contextmanager
def _cluster(config: Config) -> Iterator[str]:
    """The Ray cluster that the steps join; none where each brings its own."""
    if config.compute.backend != "local":
        yield f"one job per step ({config.compute.backend})"
        return
    # Imported here and not above: ray takes a second, which a run that is complete need not wait for.
    from ncsn.distributed.cluster import ray_cluster

    with ray_cluster(config) as address:
        yield address


@contextmanager
def _interruption_by_ray() -> Iterator[None]:
    """Ray Train takes Ctrl-C for itself, aborts the training and exits with 0 or 1, where 130 is due."""
    try:
        yield
    except SystemExit as stop:
        if stop.code in (TERMINATED, signal.SIGTERM):
            sys.exit(TERMINATED)
        raise KeyboardInterrupt from stop


def _package_of(step: str) -> str:
    return "tools" if step in BESIDE_THE_PIPELINE else "steps"


@contextmanager
def _shown_progress(folder: RunFolder, step: str, view: ProgressView, *, watched: bool) -> Iterator[None]:
    """Show when the step begins and ends, and if it is watched what it publishes meanwhile."""
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
    """Refuse to train one run twice at once: both would write the same checkpoints.

    The kernel frees the lock when its process ends, however it ends. A store that is not local has no lock.
    """
    if step not in _EXCLUSIVE or not storage.is_local(folder.uri):
        yield
        return
    path = Path(folder.uri) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            "--run", "running in another process", hint="wait for it, or choose another --run NAME", value=folder.run
        ) from None
    try:
        yield
    finally:
        lock.release()
