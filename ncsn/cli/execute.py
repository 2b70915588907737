"""Runs one step here, or the pipeline in a supervised process.

KFP and Ray print much, from several processes, at the level of file descriptors. So the pipeline gets its own process
whose output is a log file; what a person sees is read from the run's folder. The process is tied to this one: when
this one ends, however it ends, the pipe to its standard input closes and it ends itself with all its children.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout

from ncsn import storage
from ncsn.cli.console import ProgressView, console_on, quiet_libraries
from ncsn.cli.options import BESIDE_THE_PIPELINE, TERMINATED, StepFailed, stop_cleanly_on_sigterm
from ncsn.cli.target import Target, find_inputs
from ncsn.cli.views import describe_result, print_summary
from ncsn.config import Config, to_json
from ncsn.errors import Problem, UserError
from ncsn.process import require_same_python
from ncsn.runs.folder import STEPS, RunFolder, claim_run, run_folder
from ncsn.runs.records import (
    StepError,
    StepRecord,
    forget_attempts,
    read_error,
    read_progress,
    read_result,
    read_results,
    recorded,
)
from ncsn.steps.step import STEPS_ELSEWHERE
from ncsn.storage.heartbeat import Lease

_POLL_SECONDS = 0.5
_PATIENCE = ((signal.SIGINT, 10.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
_ERROR_LINE = re.compile(
    r"^\s*(?:[a-zA-Z_]\w*\.)*(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt|NotFound)): (?P<message>.+)$"
)
_LOG_TAIL_BYTES = 65536


@dataclass
class Supervisor:
    """One execution of the pipeline.

    Attributes:
        folder: The run.
        work: Local folder for KFP's own files and the log.
        view: Where progress is shown.
    """

    folder: RunFolder
    work: Path
    view: ProgressView
    _before: dict[str, StepRecord] = field(default_factory=dict, init=False)

    @property
    def log(self) -> Path:
        """Everything that KFP, Ray and the steps print."""
        return self.work / "pipeline.log"

    def run(self, config: str) -> None:
        """Execute the pipeline to its end.

        Args:
            config: The experiment as canonical JSON.

        Raises:
            StepFailed: naming the step and its reason.
        """
        self._before = read_results(self.folder)
        kfp_root = self.work / "kfp"
        earlier = set(kfp_root.glob("*"))
        request = {"config": config, "run": self.folder.run, "pipeline_root": str(kfp_root)}
        with _pipeline_process(request, self.log) as process:
            for step in STEPS:
                self.view.start(step)
                if not self._wait_for(step, process, kfp_root, earlier):
                    raise self._failure(step)
                self.view.finish(step, self._verdict(step))
            if process.wait() != 0:
                raise self._failure("finish")

    def _wait_for(self, step: str, process: subprocess.Popen[bytes], kfp_root: Path, earlier: set[Path]) -> bool:
        """Show the step's progress until KFP has its outputs; False if the pipeline ended without them."""
        while True:
            ended = process.poll() is not None
            if any((new / step / "executor_output.json").exists() for new in set(kfp_root.glob("*")) - earlier):
                return True
            if ended:
                return False
            progress = read_progress(self.folder, step)
            if progress is not None:
                self.view.update(step, progress)
            time.sleep(_POLL_SECONDS)

    def _verdict(self, step: str) -> str:
        record = read_result(self.folder, step)
        if record is None or record == self._before.get(step):
            return "already done"
        return f"done in {record.seconds:,.1f} s"

    def _failure(self, step: str) -> StepFailed:
        recorded = read_error(self.folder, step)
        if recorded is None:
            recorded = StepError("", _last_error_line(self.log) or "ended without a result", mistake=False)
        problems = recorded.problems
        if not recorded.mistake:
            first = next(iter(recorded.message.strip().splitlines()), "no reason given")
            problems = (Problem("", ": ".join(filter(None, (recorded.kind, first)))),)
        return StepFailed(step, problems, kind=recorded.kind, mistake=recorded.mistake, log=self.log)


def work_folder(folder: RunFolder) -> Path:
    """Local folder for the log and KFP's files: the run's own, or one below `.ncsn` if the store is not local."""
    if storage.is_local(folder.uri):
        return Path(folder.uri)
    return Path(".ncsn").absolute() / "runs" / folder.run


@contextmanager
def _pipeline_process(request: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.local"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        yield process
    finally:
        _stop(process)
        process.stdin.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children, gently first."""
    for number, patience in _PATIENCE:
        if process.poll() is not None:
            break
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a child that was slower to end than its parent


def _last_error_line(log: Path) -> str | None:
    """The last exception that a step's process printed, for a step that could not record its error."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()
    found = [
        match for match in map(_ERROR_LINE.match, lines) if match and "finished with status" not in match["message"]
    ]
    return f"{found[-1]['kind']}: {found[-1]['message']}" if found else None


_COMPLETE = "complete.json"


def mark_complete(folder: RunFolder, config: Config) -> dict[str, StepRecord]:
    """Note that this config's whole pipeline stands in the run's folder; the records of its steps."""
    records = read_results(folder)
    mark = {
        "of": _circumstances(config),
        "finished_at": {step: record.finished_at for step, record in records.items()},
    }
    storage.write_text(storage.join(folder.uri, _COMPLETE), json.dumps(mark, indent=1))
    return records


def complete_records(folder: RunFolder, config: Config) -> dict[str, StepRecord] | None:
    """The records of a pipeline that ran to its end with this very config, if nothing was changed or lost since."""
    mark = storage.find_json(storage.join(folder.uri, _COMPLETE))
    if mark is None or mark["of"] != _circumstances(config):
        return None
    records = read_results(folder)
    if {step: record.finished_at for step, record in records.items()} != mark["finished_at"]:
        return None
    outputs = (uri for record in records.values() for uri in _uris(record.result, folder.root))
    return records if all(storage.exists(uri) for uri in outputs) else None


def _circumstances(config: Config) -> dict[str, str]:
    """Inputs of a run's results other than the results of earlier steps."""
    from ncsn.data.source import source_fingerprint
    from ncsn.tracking.client import shown, tracking_uri

    return {
        "config": to_json(config),
        "files": source_fingerprint(config.data),
        "registry": shown(tracking_uri(config)),
    }


def _uris(result: Mapping[str, Any], root: str) -> Iterator[str]:
    return (value for value in result.values() if isinstance(value, str) and value.startswith(f"{root}/"))


_EXCLUSIVE = ("tune", "train", "run")


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
                from ncsn.distributed.faults import parse_faults

                parse_faults(settings["inject"], step=step, run_uri=folder.uri)
            with _interruption_by_ray(), recorded(target.config, target.run, step):
                if lease:  # a retry by the cluster for a launcher that an earlier attempt gave up
                    Lease(lease).require("nothing was begun")
                require_same_python()
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
