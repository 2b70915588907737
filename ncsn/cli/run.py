"""`ncsn run`, `ncsn <step>` and `ncsn select`: one step, or all in turn, and what a person sees of them."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from ncsn import storage
from ncsn.answer import answer
from ncsn.cli.console import ProgressView, console_on, describe_result, print_summary, shown_progress
from ncsn.cli.options import StepFailed
from ncsn.events import announced
from ncsn.progress import read_progress
from ncsn.runs.code import publish_code
from ncsn.runs.folder import (
    DEFAULT_ROOT,
    ForeignRun,
    Outcome,
    Run,
    RunFolder,
    folders_of,
    images_seen_at,
    read_outcome,
    read_results,
    read_step,
    said_newest,
    write_end,
    write_outcome,
)
from ncsn.runs.steps import SEARCH, STEPS, STEPS_ELSEWHERE, steps_of
from ncsn.steps.execute import Observer, execute, refuse

_POLL_SECONDS = 0.5


class Terminal(Observer):
    """Shows steps on stderr, with bars on a terminal; all other output goes to the log. Says what an interruption left.

    `whole` is the run whose steps these are; None for a single step, of which `events` are sent.
    """

    def __init__(self, whole: Run | None = None, *, events: bool = False) -> None:
        self.whole, self._events = whole, events
        self.log = None if whole is None else _work_folder(whole) / "log.txt"
        self.step, self.run = "", whole  # what is being done
        self._stack = ExitStack()
        self._ended, self._watcher, self._since = threading.Event(), threading.Thread(), 0.0

    @cached_property
    def view(self) -> ProgressView:
        return self._stack.enter_context(shown_progress(self.log))

    def __enter__(self) -> Terminal:
        if self.whole is not None:
            self.view.console.print(f"run    {self.whole.folder.uri}\nlog    {self.log}", soft_wrap=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.run is not None and isinstance(error, KeyboardInterrupt | SystemExit):
                told = f"continues with {self.step or STEPS[0]}"
                if self.step == "train":
                    newest = said_newest(self.run.folder.checkpoints)
                    if "-" in newest:
                        newest = f"image {images_seen_at(newest):,} of {self.run.config.train.num_images:,}"
                        finish = f"`ncsn run {self.run.folder.options(self.run.config)} --finish`"
                        newest += f"; {finish} makes the model of what is trained"
                    told = f"continues training from {newest}"
                self.view.console.print(f"interrupted; the same command {told}", highlight=False, soft_wrap=True)
                sys.exit(answer.code)
            if self.whole is not None and self.log is not None and isinstance(error, Exception):
                traceback.print_exc()
                if self.step:
                    raise StepFailed(self.step, error, log=self.log) from error
        finally:
            self._stack.__exit__(kind, error, trace)

    def started(self, step: str, run: Run, inputs: Mapping[str, str]) -> None:
        """Show the step, and from now on the progress that it publishes."""
        folder = run.folder
        if self.whole is None:
            self.log = _work_folder(run) / "steps" / step / "log.txt" if sys.stderr.isatty() else None
            line = f"run {run.name}" + (f"   log {self.log}" if self.log else "")
            self.view.console.print(line, soft_wrap=True)
        if self._events:
            self._stack.enter_context(announced(run.name, root=folder.root, step=step))
        self.step, self.run, self._since = step, run, time.monotonic()
        chosen = read_step(folder, "select").result
        if step != "register" and chosen.get("kept") and chosen["checkpoint"] == inputs.get("checkpoint"):
            self.view.console.print(f"checkpoint {chosen['checkpoint']}, chosen by `ncsn select`", soft_wrap=True)
        self.view.start(step)
        self._ended = ended = threading.Event()
        before = repr(read_progress(folder.step(step, "progress.json")))  # of an earlier attempt

        def watch() -> None:
            while not ended.wait(_POLL_SECONDS):
                progress = read_progress(folder.step(step, "progress.json"))
                if progress is not None and repr(progress) != before:
                    self.view.update(step, progress)

        self._watcher = threading.Thread(target=watch, daemon=True)
        here = run.config.compute.backend == "local" or step not in STEPS_ELSEWHERE
        if here or self.view.console.is_terminal:  # else the driver's log has these lines, and is shown
            self._watcher.start()

    def ended(self, step: str, run: Run, *, again: bool) -> None:  # noqa: ARG002
        """Show in how many seconds it was done."""
        self._stop_watching()
        self.view.finish(step, "already done" if again else f"done in {time.monotonic() - self._since:,.1f} s")

    def failed(self, step: str, run: Run, error: BaseException) -> None:  # noqa: ARG002
        """The command says why."""
        self._stop_watching()

    def _stop_watching(self) -> None:
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join()


def run_pipeline(run: Run, *, code_here: bool, as_json: bool, finish: bool = False) -> None:
    """Do the steps that are not done, on one Ray cluster, and print the summary; with `finish` train no further."""
    config = run.config
    steps = steps_of(config)
    for step in steps:
        refuse(step, run)
    if code_here:
        publish_code(config.storage.root)
    with run.alone():
        run.claim()
        with announced(run.name, root=run.folder.root):
            do_steps(run, steps, finish=finish)
    folders = folders_of(run.folder, config)
    records = read_results(folders)
    if as_json:
        results = {step: record.result for step, record in records.items()}
        click.echo(json.dumps({"run": run.name, "uri": run.folder.uri, "steps": results}, indent=1))
    else:
        print_summary(console_on(sys.stdout), folders["train"], config, records)


def do_steps(run: Run, steps: tuple[str, ...], *, finish: bool = False) -> None:
    """Do these steps of a run, and write how it ended; what a search finds is trained as another run."""
    # One Ray cluster for all steps, which starts during the first. None where each step is a job; and a run that was
    # finished once is hardly worth one: a step that has work to do after all starts its own.
    cluster: AbstractContextManager[Callable[[], object]] = nullcontext(lambda: None)
    config, step = run.config, steps[0]
    if config.compute.backend == "local" and STEPS[-1] not in read_results(folders_of(run.folder, config)):
        from ncsn.distributed.cluster import ray_cluster_meanwhile

        cluster = ray_cluster_meanwhile(config)
    runs, given, before = [run], dict[str, str | None](), read_outcome(run.folder)
    storage.delete(run.folder.status)  # the run has not ended
    with Terminal(run) as terminal, cluster as ray_started:
        try:
            for step in steps:
                if step != STEPS[0]:
                    ray_started()
                options: dict[str, Any] = {"finish": True} if finish and step == "train" else {}
                result = execute(step, runs[-1], terminal, given=given, **options)
                if step == STEPS[0]:
                    given["dataset"] = result.uri
                elif step == SEARCH:
                    from ncsn.steps.search import trainable

                    runs.append(Run(trainable(result, config), result.run))
                    storage.delete(runs[-1].folder.status)
        except BaseException as error:
            if not isinstance(error, ForeignRun):
                write_end(config, [each.folder for each in runs], step, error)
            elif before is not None:  # another command works on the run, and this one has changed nothing
                write_outcome(run.folder, before)
            raise
        for each in runs:
            write_outcome(each.folder, Outcome("FINISHED"))


def run_step(step: str, run: Run, *, code_here: bool, given: Mapping[str, str | None]) -> Any:
    if code_here:
        publish_code(run.config.storage.root)
    lease = given.get("lease")
    with Terminal(events=lease is None) as terminal:  # else the launcher sends them
        return execute(step, run, terminal, given=given, lease=lease)


def run_select(run: Run, *, code_here: bool, given: Mapping[str, str | None], as_json: bool) -> None:
    """Choose the best checkpoint of a run; then sample, evaluate and register it, and report, unless the last stays."""
    steps = steps_of(run.config)
    steps = steps[steps.index("sample") :]
    for step in steps:
        refuse(step, run)
    found = {"select": run_step("select", run, code_here=code_here, given=given)}
    last = read_step(run.folder, "sample").result.get("checkpoint")
    done = not found["select"].kept and last == found["select"].checkpoint
    if given.get("lease") is None and not done:  # else the launcher does the rest
        inputs: dict[str, str | None] = {"dataset": given.get("dataset"), "checkpoint": found["select"].checkpoint}
        for step in steps:
            found[step] = run_step(step, run, code_here=False, given=inputs)
    if as_json:
        click.echo(json.dumps({step: dataclasses.asdict(result) for step, result in found.items()}, indent=1))
    else:
        click.echo("\n".join(describe_result(step, result, run.config) for step, result in found.items()))


def _work_folder(run: Run) -> Path:
    """Local folder for the log: the run's own, or below `.ncsn` if the store is not local."""
    uri = run.folder.uri
    return Path(uri if storage.is_local(uri) else RunFolder(storage.absolute(DEFAULT_ROOT), run.name).uri)
