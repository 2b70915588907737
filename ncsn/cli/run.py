"""`ncsn run`, `ncsn <step>` and `ncsn select`: one step, or all in turn, and what a person sees of them."""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
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
from ncsn.runs.layout import DEFAULT_ROOT, RunFolder, images_seen_at, said_newest
from ncsn.runs.record import (
    ForeignRun,
    Outcome,
    finished_steps,
    folders_of,
    read_result,
    write_end,
    write_outcome,
)
from ncsn.runs.results import IngestResult, Result, SampleResult, SearchResult, SelectResult, TrainResult
from ncsn.runs.run import Run
from ncsn.runs.steps import FIRST, STEP_TABLE, steps_of
from ncsn.steps.execute import Observer, execute, require_possible

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
                told = f"continues with {self.step or FIRST}"
                if self.step == TrainResult.step:
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
        source = STEP_TABLE[step].inputs.get("checkpoint")
        chosen = read_result(folder, SelectResult) if source and source.selectable else None
        if chosen and chosen.kept and chosen.checkpoint == inputs["checkpoint"]:
            self.view.console.print(f"checkpoint {chosen.checkpoint}, chosen by `ncsn select`", soft_wrap=True)
        self.view.start(step)
        self._ended = ended = threading.Event()
        before = repr(read_progress(folder.step(step, "progress.json")))  # of an earlier attempt

        def watch() -> None:
            while not ended.wait(_POLL_SECONDS):
                progress = read_progress(folder.step(step, "progress.json"))
                if progress is not None and repr(progress) != before:
                    self.view.update(step, progress)

        self._watcher = threading.Thread(target=watch, daemon=True)
        here = run.config.compute.backend == "local" or not STEP_TABLE[step].workers
        if here or self.view.console.is_terminal:  # else the driver's log has these lines, and is shown
            self._watcher.start()

    def begun(self, run: Run) -> None:
        """A run whose step works has not ended; a single step leaves the end of its run."""
        if self.whole is not None:
            storage.delete(run.folder.status)

    def ended(self, step: str, run: Run, *, again: bool) -> None:  # noqa: ARG002
        """Show in how many seconds it was done."""
        self._stop_watching()
        self.view.finish(step, "already done" if again else f"done in {time.monotonic() - self._since:,.1f} s")

    def failed(self, step: str, run: Run, error: BaseException) -> None:  # noqa: ARG002
        """The command says why."""
        self.step = step  # it may not have begun
        self._stop_watching()

    def _stop_watching(self) -> None:
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join()


def run_pipeline(run: Run, *, code_here: bool, as_json: bool, finish: bool = False) -> None:
    """Do the steps that are not done, on one Ray cluster, and print the summary; with `finish` train no further."""
    steps = steps_of(run.config)
    _begin(steps, run, code_here=code_here)
    with run.alone():
        run.claim()
        with announced(run.name, root=run.folder.root):
            do_run(steps, run, finish=finish)
    folders = folders_of(run.folder, run.config)
    results = finished_steps(folders)
    if as_json:
        values = {step: finished.values for step, finished in results.items()}
        click.echo(json.dumps({"run": run.name, "uri": run.folder.uri, "steps": values}, indent=1))
    else:
        print_summary(console_on(sys.stdout), folders[TrainResult.step], run.config, results)


def run_step(step: str, run: Run, *, code_here: bool, given: Mapping[str, str | None]) -> Any:
    """Do one step."""
    _begin((), run, code_here=code_here)
    with Terminal(events=given.get("lease") is None) as terminal:  # else the launcher sends them
        return do_steps((step,), [run], terminal, given=given)[step]


def run_select(run: Run, *, code_here: bool, given: Mapping[str, str | None], as_json: bool) -> None:
    """Choose the best checkpoint of a run; then sample, evaluate and register it, and report, unless the last stays."""
    steps = steps_of(run.config)
    steps = steps[steps.index(SampleResult.step) :]
    _begin(steps, run, code_here=code_here)
    chosen: SelectResult = run_step(SelectResult.step, run, code_here=False, given=given)
    found: dict[str, Result] = {chosen.step: chosen}
    sampled = read_result(run.folder, SampleResult)
    same = not chosen.kept and sampled is not None and sampled.checkpoint == chosen.checkpoint
    if given.get("lease") is None and not same:  # else the launcher does the rest
        inputs = {"dataset": given.get("dataset"), "checkpoint": chosen.checkpoint}
        for step in steps:
            found[step] = run_step(step, run, code_here=False, given=inputs)
    if as_json:
        click.echo(json.dumps({step: result.plain() for step, result in found.items()}, indent=1))
    else:
        click.echo("\n".join(describe_result(result, run.config) for result in found.values()))


def _begin(steps: Sequence[str], run: Run, *, code_here: bool) -> None:
    """Refuse what is not possible of these steps, and publish this clone's code if jobs run it."""
    for step in steps:
        require_possible(step, run)
    if code_here:
        publish_code(run.config.storage.root)


def do_run(steps: Sequence[str], run: Run, *, finish: bool) -> None:
    """Do the steps of a run on one Ray cluster, and write how it ended."""
    # The cluster starts during the first step. None where each step is a job; and a run that was finished once is
    # hardly worth one: a step that has work to do after all starts its own.
    cluster: AbstractContextManager[Callable[[], object]] = nullcontext(lambda: None)
    config = run.config
    if config.compute.backend == "local" and steps[-1] not in finished_steps(folders_of(run.folder, config)):
        from ncsn.distributed.cluster import ray_cluster_meanwhile

        cluster = ray_cluster_meanwhile(config)
    runs = [run]
    with Terminal(run) as terminal, cluster as ray_started:
        try:
            do_steps(steps, runs, terminal, finish=finish, ray_started=ray_started)
        except BaseException as error:
            if not isinstance(error, ForeignRun):  # else it has changed nothing
                write_end(config, [each.folder for each in runs], terminal.step or steps[0], error)
            raise
        for each in runs:
            write_outcome(each.folder, Outcome("FINISHED"))


def do_steps(
    steps: Sequence[str],
    runs: list[Run],
    terminal: Terminal,
    *,
    given: Mapping[str, str | None] = {},
    finish: bool = False,
    ray_started: Callable[[], object] = lambda: None,
) -> dict[str, Result]:
    """Do these steps in turn, from `given` inputs on; the results by step.

    What a search finds is trained as another run, which joins `runs`: the last of them is the one that steps are of.
    `ray_started` waits for the Ray cluster, which the first step does without.
    """
    results = dict[str, Result]()
    for step in steps:
        if results:
            ray_started()
        options: dict[str, Any] = {"finish": True} if finish and step == TrainResult.step else {}
        inputs, lease = dict(given), given.get("lease")
        if isinstance(ingested := results.get(FIRST), IngestResult):
            inputs["dataset"] = ingested.uri  # the run that trains what a search finds has read no images itself
        results[step] = result = execute(step, runs[-1], terminal, given=inputs, lease=lease, **options)
        if isinstance(result, SearchResult):
            from ncsn.steps.search import trainable

            runs.append(Run(trainable(result, runs[-1].config), result.run))
    return results


def _work_folder(run: Run) -> Path:
    """Local folder for the log: the run's own, or below `.ncsn` if the store is not local."""
    uri = run.folder.uri
    return Path(uri if storage.is_local(uri) else RunFolder(storage.absolute(DEFAULT_ROOT), run.name).uri)
