"""Runs one step, or all steps of a run, and shows what they do."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from heapq import nlargest
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout
from rich.console import Console

from ncsn import storage
from ncsn.cli.console import ProgressView, console_on, describe_result, print_summary, shown_progress
from ncsn.cli.options import INTERRUPTED, StepFailed, stop_cleanly_on_sigterm
from ncsn.cli.target import Target, TargetOptions
from ncsn.config import Config, changed_settings, continues, from_yaml
from ncsn.errors import UserError
from ncsn.events import announced
from ncsn.process import TERMINATED
from ncsn.progress import read_progress
from ncsn.report.words import next_step
from ncsn.runs.code import publish_code
from ncsn.runs.folder import DEFAULT_ROOT, RunFolder, claim_run, folders_of, read_results, read_step, run_folder
from ncsn.runs.steps import CONTINUING, PIPELINE, STEPS, STEPS_ELSEWHERE
from ncsn.steps.execution import images_of_run, preflight, run_all, run_step
from ncsn.storage.retry import limited
from ncsn.tools.listing import MOST, begun

_POLL_SECONDS = 0.5
_SAVE_SECONDS = 10.0


def run_one(step: str, target: Target, *, given: Mapping[str, str | None]) -> dict[str, Any]:
    """The result of one step."""
    if target.code_here:
        publish_code(target.config.storage.root)

    @contextmanager
    def around(step: str, folder: RunFolder, inputs: Mapping[str, str]) -> Iterator[None]:
        log = work_folder(folder) / "steps" / step / "log.txt" if sys.stderr.isatty() else None
        # A step with a launcher needs no lock: the launcher's lock, or the name of the job, is one.
        with nullcontext() if lease else _alone(folder, step), shown_progress(log) as view:
            console = view.console
            console.print(f"run {folder.run}" + (f"   log {log}" if log else ""), soft_wrap=True)
            if not given.get("checkpoint"):
                _say_if_selected(console, folder, inputs.get("checkpoint"))
            end = _ends_as_told(console, lambda: _continues(target.config, step, folder))
            events = nullcontext() if lease else announced(folder.run, root=folder.root, step=step)  # by the launcher
            with end, events, _shown(step, folder, view, target.config):
                yield

    lease = given.get("lease")
    result = run_step(step, target.config, run=target.run, given=given, lease=lease, around=around)
    return dataclasses.asdict(result)


def select_best(target: Target, *, given: Mapping[str, str | None], as_json: bool) -> None:
    """Choose the best checkpoint of a run; then sample, evaluate and register it, and report."""
    found = {"select": run_one("select", target, given=given)}
    if given.get("lease") is None:  # else the launcher does the rest
        sampling = target.config.sampling.model_copy(update={"relative_width": None})  # that of the chosen weights
        target = replace(target, config=target.config.model_copy(update={"sampling": sampling}))
        inputs: dict[str, str | None] = {"dataset": given.get("dataset"), "checkpoint": found["select"]["checkpoint"]}
        for step in STEPS[STEPS.index("sample") :]:
            found[step] = run_one(step, target, given=inputs)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo("\n".join(describe_result(step, result) for step, result in found.items()))


def _say_if_selected(console: Console, folder: RunFolder, checkpoint: str | None) -> None:
    if checkpoint is not None and read_step(folder, "select").result.get("checkpoint") == checkpoint:
        console.print(f"checkpoint {checkpoint}, chosen by `ncsn select`", soft_wrap=True)


def run_pipeline(target: Target, *, as_json: bool, finish: bool = False) -> None:
    """Run the steps that are not done, on one Ray cluster, and print the summary; with `finish` train no further."""
    config = target.config
    for step in STEPS if config.search is None else PIPELINE:
        preflight(step, config, run_folder(config, target.run))
    images = images_of_run(STEPS[0], config, run_folder(config, target.run))
    if target.code_here:
        publish_code(config.storage.root)
    folder = claim_run(config, target.run)
    before = read_results(folders_of(folder, config))
    _say_if_longer(config, folder)
    with _alone(folder, "run"), announced(folder.run, root=folder.root):
        _execute(config, folder, {STEPS[0]: images, "train": {"finish": finish}})
    records = read_results(folders_of(folder, config))
    if as_json:
        results = {step: record.result for step, record in records.items()}
        click.echo(json.dumps({"run": target.run, "uri": folder.uri, "steps": results}, indent=1))
    else:
        earlier = [step for step, record in records.items() if record == before.get(step)]
        trained = folders_of(folder, config)["train"]
        print_summary(console_on(sys.stdout), trained, config, records, earlier=earlier)


def _say_if_longer(config: Config, folder: RunFolder) -> None:
    """Say of a new run that is as one of the newest, but longer, that it does not go on from that one's weights."""
    if continues(config) or not config.loss.learns_score or read_step(folder, "train").state:
        return
    dates = begun(folder.root)
    for run in nlargest(MOST, dates, key=dates.__getitem__):
        other = RunFolder(folder.root, run)
        with suppress(OSError, UserError):  # of another version, or deleted
            owner = from_yaml(storage.read_text(other.config))
            changed, longer = changed_settings(owner, config), config.train.num_images > owner.train.num_images
            if longer and changed.keys() == {"train.num_images"} and read_step(other, "train").result:
                command, what = next_step("short", owner, other)
                told = f"{run} is as this one but shorter, and `{command}` is {what}"
                click.echo(f"note: this run starts at zero; {told}", err=True)
                return


def _execute(config: Config, folder: RunFolder, options: Mapping[str, Mapping[str, Any]]) -> None:
    log = work_folder(folder) / "log.txt"
    working_on, working_in = "", folder

    @contextmanager
    def around(step: str, of: RunFolder, inputs: Mapping[str, str]) -> Iterator[None]:
        nonlocal working_on, working_in
        working_on, working_in = step, of
        if step != STEPS[0]:
            ray_started()
        if step == "sample":
            _say_if_selected(view.console, of, inputs["checkpoint"])
        with nullcontext() if of == folder else _alone(of, step), _shown(step, of, view, config):
            yield

    # One Ray cluster for all steps, which starts during the first. None where each step is a job; and a run that was
    # finished once is hardly worth one: a step that has work to do after all starts its own.
    cluster: AbstractContextManager[Callable[[], object]] = nullcontext(lambda: None)
    finished = STEPS[-1] in read_results(folders_of(folder, config))
    if config.compute.backend == "local" and not finished:
        from ncsn.distributed.cluster import ray_cluster_meanwhile

        cluster = ray_cluster_meanwhile(config)
    with shown_progress(log) as view:
        view.console.print(f"run    {folder.uri}\nlog    {log}", soft_wrap=True)
        try:
            end = _ends_as_told(view.console, lambda: _continues(config, working_on, working_in))
            with end, cluster as ray_started:
                run_all(config, run=folder.run, around=around, options=options)
        except Exception as error:
            traceback.print_exc()
            if not working_on:
                raise
            raise StepFailed(working_on, error, log=log) from error


@contextmanager
def _ends_as_told(console: Console, continues: Callable[[], str]) -> Iterator[None]:
    """End with `TERMINATED` after SIGTERM and with `INTERRUPTED` after Ctrl-C, and say what `continues` says."""
    # Whatever Ray makes of them: of any exit code, a wait for Ray makes 1.
    told = stop_cleanly_on_sigterm()
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as stop:
        terminated = told.is_set() or (isinstance(stop, SystemExit) and stop.code == TERMINATED)
        console.print(f"interrupted; {continues()}", highlight=False, soft_wrap=True)
        sys.exit(TERMINATED if terminated else INTERRUPTED)


def _continues(config: Config, step: str, folder: RunFolder) -> str:
    """What the same command does after an interruption."""
    if step != "train":
        return f"the same command continues with {step or STEPS[0]}"
    from ncsn.model.checkpoint import images_seen_at
    from ncsn.model.checkpoint_store import CheckpointStore

    try:
        with limited(0):
            newest = next(CheckpointStore(folder.checkpoints).resumable(), None)
    except OSError:
        return "the same command continues training from its last checkpoint"
    if newest is None:
        return "there is no checkpoint yet: the same command begins training again"
    place = f"image {images_seen_at(newest):,} of {config.train.num_images:,}"
    instead = f"`ncsn run {folder.options} --finish` makes the model of what is trained"
    return f"the same command continues training from {place}; {instead}"


@contextmanager
def _saved_first(folder: RunFolder, console: Console) -> Iterator[None]:
    """On Ctrl-C or SIGTERM let the training in this block save and end, before the block ends as it does without this.

    It has `_SAVE_SECONDS`. A second signal ends the block at once.
    """
    told, ended = list[signal.Signals](), threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def save(number: signal.Signals) -> None:
        if read_progress(folder.step("train", "progress.json")) is not None:  # else it has not begun
            console.print(f"interrupted: saving, for at most {_SAVE_SECONDS:.0f} s; Ctrl-C again ends at once")
            with suppress(OSError), limited(_SAVE_SECONDS):
                storage.write_text(folder.step("train", "stop"), "")
            if ended.wait(_SAVE_SECONDS):
                return
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    def handle(number: int, _frame: object) -> None:
        restore()
        told.append(signal.Signals(number))
        # In a thread, since the store's client may be what the signal interrupts.
        threading.Thread(target=save, args=told, daemon=True).start()

    for number, handler in before.items():
        if callable(handler):  # a shell's background job ignores Ctrl-C
            signal.signal(number, handle)
    try:
        yield
    finally:
        ended.set()
        restore()
        if told:
            signal.raise_signal(told[0])


@contextmanager
def _shown(step: str, folder: RunFolder, view: ProgressView, config: Config) -> Iterator[None]:
    """Show when the step starts and ends, and the progress that it publishes; a training here may save first."""
    ended = threading.Event()
    here = config.compute.backend == "local" or step not in STEPS_ELSEWHERE
    watched = here or view.console.is_terminal  # else the driver's log has these lines, and is shown
    saved = _saved_first(folder, view.console) if here and step == "train" else nullcontext()

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            progress = read_progress(folder.step(step, "progress.json"))
            if progress is not None:
                view.update(step, progress)

    before, started = read_step(folder, step).finished_at, time.monotonic()
    storage.delete(folder.step(step, "progress.json"))
    view.start(step)
    watcher = threading.Thread(target=watch, daemon=True)
    if watched:
        watcher.start()
    try:
        with saved:
            yield
    finally:
        ended.set()
        if watched:
            watcher.join()
    again = read_step(folder, step).finished_at == before
    view.finish(step, "already done" if again else f"done in {time.monotonic() - started:,.1f} s")


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


def serve_ui(options: TargetOptions, *, host: str, port: int) -> None:
    """Serve MLflow's pages until Ctrl-C, and open that of the run, or the list of runs, where there is a browser."""
    from ncsn.tracking.client import server_command
    from ncsn.tracking.mlflow_runs import front_page

    uri = options.registry
    command = server_command(uri, host=host, port=port)
    require_free(host, port)  # MLflow's server exits with 0 if it cannot listen
    address = f"http://{host}:{port}{front_page(uri, run=options.run)}"
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}  # of deprecations that only MLflow can mend
    with subprocess.Popen(command, start_new_session=True, env=quiet) as server, suppress(KeyboardInterrupt):  # noqa: S603
        try:
            while server.poll() is None:
                with suppress(ConnectionError), socket.create_connection((host, port)):
                    click.echo(address, err=True)
                    if sys.stderr.isatty() and ("DISPLAY" in os.environ or sys.platform == "darwin"):
                        click.launch(address)
                    break
                time.sleep(_POLL_SECONDS)
            sys.exit(server.wait())
        finally:
            server.terminate()  # Ctrl-C does not reach it: it has its own session


def require_free(host: str, port: int) -> None:
    """Raise `UserError` if this process cannot listen there."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0].lower()
        key, value = ("--port", port) if error.errno in (errno.EADDRINUSE, errno.EACCES) else ("--host", host)
        raise UserError(key, reason, hint=f"choose another {key}", value=value) from None


def work_folder(folder: RunFolder) -> Path:
    """Local folder for the log: the run's own, or below `.ncsn` if the store is not local."""
    if storage.is_local(folder.uri):
        return Path(folder.uri)
    return Path(RunFolder(storage.absolute(DEFAULT_ROOT), folder.run).uri)
