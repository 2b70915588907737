"""What a command prints: the progress of its steps, results and plans."""

from __future__ import annotations

import io
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.color import Color
from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from ncsn.config import Config
from ncsn.errors import in_one_line
from ncsn.progress import Progress
from ncsn.report import words
from ncsn.report.pages import markdown_table
from ncsn.report.words import SCORES_HEAD, duration, next_step, score_rows, takes
from ncsn.runs.layout import RunFolder, addresses
from ncsn.runs.record import Finished
from ncsn.runs.results import (
    EvaluateResult,
    RegisterResult,
    ReportResult,
    Result,
    SampleResult,
    SearchResult,
    SelectResult,
)
from ncsn.storage.retry import RETRY

_LINE_EVERY_SECONDS, _MOST_SECONDS = 30.0, 600.0
_LINE_EVERY_SHARE, _LEAST_SHARE = 0.25, 0.02  # of a step


class ProgressView:
    """Shows progress: bars on a terminal, within the block of `bars`; a few lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown = 0, 0.0, 0.0, ""  # units, their share, and the time of the last line; the name of a unit
        self.bars = Bars(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            speed_estimate_period=600.0,  # seconds, so that pauses are part of the rate
            disable=not console.is_terminal,
            # Ray keeps the sys.stdout that it finds until the interpreter ends, so do not replace it.
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def start(self, step: str) -> None:
        """A step starts; its length is not known yet."""
        self.bars.add_task(step, total=None, text="starting")
        if not self.console.is_terminal:
            self.console.print(f"{step:<9} starting", highlight=False)
        self._shown = -1, 0.0, time.monotonic(), ""

    def update(self, step: str, progress: Progress) -> None:
        task, count = self.bars.tasks[-1], f"{progress.done:,} / {progress.total:,} {progress.unit}"
        note = f"   {progress.text}" if progress.text else ""
        self.bars.update(
            task.id, completed=progress.done, total=progress.total or None, text=count + note, refresh=True
        )
        # Elsewhere, a line at every quarter of a step and every half minute, but of a long step none close behind
        # another, of which a day would have hundreds and the end two, and none for work repeated after a failure.
        done, share, then, unit = self._shown
        another = bool(unit) and progress.unit != unit  # part of the step; of short ones nothing is shown
        if another:
            done, share = -1, 0.0
        now, reached = time.monotonic(), progress.done / progress.total if progress.total else 0.0
        farther = done < 0 or reached >= share + _LEAST_SHARE or now >= then + _MOST_SECONDS
        due = now >= then + _LINE_EVERY_SECONDS and farther
        quarter = not another and reached >= share + _LINE_EVERY_SHARE
        if not self.console.is_terminal and progress.done > done and (due or quarter):
            self._shown = progress.done, reached, now, progress.unit
            if (speed := task.speed) and (left := task.time_remaining):
                rate = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
                count += f"   {rate} {progress.unit}/s, {duration(left)} left"
            self.console.print(f"{step:<9} {count}{note}", highlight=False)

    def finish(self, step: str, text: str) -> None:
        self.bars.remove_task(self.bars.tasks[-1].id)
        self.bars.refresh()
        mark = [Text("✓", "green")] if self.console.is_terminal else []
        self.console.print(*mark, f"{step:<9} {text}", highlight=False, soft_wrap=True)


class ShownProgress(Progress):
    """The progress of a step in this process."""

    def __init__(self, view: ProgressView, step: str) -> None:
        super().__init__()
        self._view, self._step = view, step

    def changed(self) -> None:
        self._view.update(self._step, self)


def picture(png: bytes) -> Text:
    """A PNG file for a terminal, two pixels in a character."""
    shown = Image.open(io.BytesIO(png)).convert("RGB")
    shown.thumbnail((76, 76))
    text = Text()
    for y in range(0, shown.height - 1, 2):
        for x in range(shown.width):
            colors = (Color.from_rgb(*cast(tuple[int, int, int], shown.getpixel((x, y + row)))) for row in (0, 1))
            text.append("▀", Style.from_color(*colors))
        text.append("\n")
    return text


def console_on(stream: TextIO) -> Console:
    """A console on `stream` for texts without markup, since they may hold names of files and classes.

    Unless that is a terminal, nobody sees the edge, and nothing is cut or wrapped.
    """
    return Console(file=stream, width=None if stream.isatty() else 100_000, highlight=False, markup=False)


class Log:
    """A text file that shows on a console too what a launcher says, and messages about retries without Ray's words.

    A full disk delays or loses its lines and raises nothing, so that what comes next is shown.
    """

    def __init__(self, file: TextIO, console: Console) -> None:
        self._file, self._console = file, console

    def show(self, line: str, *, of_driver: bool) -> None:
        """Show a line that will be written; of the driver's log only where no bars show its progress."""
        if RETRY not in line and not (of_driver and self._console.is_terminal):
            self._console.print(line, soft_wrap=True)

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if RETRY in line:
                self._console.print(line[line.index(RETRY) :], soft_wrap=True)
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def shown_progress(log: Path | None) -> Iterator[ProgressView]:
    """Send all output of the block to `log`, or to stderr without one, and show progress on the stderr from before."""
    with ExitStack() as stack:
        own = sys.stderr
        if own is sys.__stderr__:
            own = stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1))
        view = ProgressView(console_on(own))
        target = own
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            target = cast(TextIO, stack.enter_context(closing(Log(log.open("a", buffering=1), view.console))))
        # Threads of Ray and Arrow write to the descriptors, not through sys.stdout.
        stack.enter_context(_moved(1, target))
        stack.enter_context(_moved(2, target))
        stack.enter_context(redirect_stdout(target))
        stack.enter_context(redirect_stderr(target))
        stack.enter_context(view.bars)
        yield view


@contextmanager
def _moved(descriptor: int, target: TextIO) -> Iterator[None]:
    saved = os.dup(descriptor)
    try:
        os.dup2(target.fileno(), descriptor)
        yield
    finally:
        target.flush()
        os.dup2(saved, descriptor)
        os.close(saved)


def describe_result(result: Result, config: Config, **more: str | None) -> str:
    """The result of one step in a few lines, and `more` places."""
    step, values = result.step, {**vars(result), **more}
    places = ("uri", "config", "table", "grid", "strip", "plot", "checkpoint", *more)
    lines = [*filter(None, [result.headline]), f"{step}: {result}"]
    lines += [f"{key}: {values[key]}" for key in places if isinstance(values.get(key), str)]
    if isinstance(result, SearchResult):
        command = " ".join([f"ncsn run --config {shlex.quote(result.config)}", *addresses(config)])
        lines = [_trials_table(result), *lines, f"next: {command}"]
    elif isinstance(result, SelectResult):
        rows = words.candidate_lines(result.candidates, most=20)
        lines = [markdown_table(words.candidates_head(result.figure), rows), *lines]
    return "\n".join(map(in_one_line, [*lines, *(f"note: {note}" for note in values.get("notes", ()))]))


def print_summary(console: Console, folder: RunFolder, config: Config, results: Mapping[str, Finished]) -> None:
    """The verdict and the next command; steps, scores and outputs."""
    from ncsn.errors import without_users
    from ncsn.tracking.client import tracking_uri

    evaluated: EvaluateResult = results[EvaluateResult.step].result
    registered: RegisterResult = results[RegisterResult.step].result
    sampled: SampleResult = results[SampleResult.step].result
    console.print(evaluated.verdict, style="bold", soft_wrap=True)
    if registered.utility:  # of a run without the section too, once it was asked
        console.print(registered.utility, style="bold", soft_wrap=True)
    command, what = next_step(evaluated.grade, config, folder)
    console.print(f"next: {command}\n      ({what})", soft_wrap=True)
    steps = Table("step", Column("seconds", justify="right"), "result", box=SIMPLE_HEAD)
    for step, finished in results.items():
        steps.add_row(step, f"{finished.seconds:,.1f}", str(finished))
    steps.add_row("all", f"{sum(finished.seconds for finished in results.values()):,.1f}", style="bold")
    first, *others = SCORES_HEAD
    scores = Table(first, *(Column(name, justify="right") for name in others), box=SIMPLE_HEAD)
    for row in score_rows(evaluated.plain()):
        scores.add_row(row.name, row.text, row.real_text)
    console.print(steps, scores)
    for note in (note for finished in results.values() for note in finished.values.get("notes", ())):
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"gate: {registered.reason}\n", soft_wrap=True)
    server = without_users(tracking_uri(config))
    for name, value in (
        ("grid", sampled.grid),
        ("strip", sampled.strip),
        ("report", results[ReportResult.step].result.uri),
        ("model", registered.uri),
        ("mlflow", f"run {folder.run} in experiment {config.tracking.experiment} at {server}"),
        ("", f"ncsn ui {folder.options(config)}"),
    ):
        console.print(Text(f"{name:<8}", "bold"), value, soft_wrap=True)


def _trials_table(result: SearchResult) -> str:
    """The trials of a search, best first, as text."""
    paths = list(result.values)
    numbers = (Column(name, justify="right") for name in ("images", "objective", "seconds"))
    table = Table("trial", *(path.rpartition(".")[2] for path in paths), "epsilon", *numbers, "status", box=SIMPLE_HEAD)

    def rank(row: Mapping[str, Any]) -> tuple[bool, int, float]:
        """Successful trials first, then the furthest, then the best."""
        return row["status"] == "failed", -row["images_seen"], row["objective"] if row["images_seen"] else row["trial"]

    def short(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    for row in sorted(result.trials, key=rank):
        values = [*(row["values"][path] for path in paths), (row["sampler"] or {}).get("epsilon")]
        status = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
        done = f"{row['images_seen']:,}", short(row["objective"]), f"{row['seconds']:,.0f}"
        table.add_row(str(row["trial"]), *map(short, values), *done, status)
    console = Console(width=max(100, 24 * (len(paths) + 5)), record=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def print_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """Time and cost of training and sampling, and what they are computed from."""
    table = Table(
        "step", *(Column(name, justify="right") for name in ("time", "CPU hours", "GPU hours")), box=SIMPLE_HEAD
    )
    for step, cost in plan["steps"].items():
        table.add_row(step, duration(cost["seconds"]), f"{cost['cpu_hours']:,.2f}", f"{cost['gpu_hours']:,.2f}")
    console.print(table)
    flop, seconds = plan["gflop"], sum(cost["seconds"] for cost in plan["steps"].values())
    lines = [
        *([f"time     {takes(seconds, times=plan['slowdown'])}"] if "slowdown" in plan else []),
        f"network  {plan['parameters']:,} parameters; {flop['train']:,.3g} GFLOP to train an image, "
        f"{flop['sample']:,.3g} to evaluate one",
        f"rate     {plan['images_per_second']:,.0f} training images/s, {plan['basis']}; NFE {plan['nfe']}",
        f"memory   {plan['worker_gb']:.2f} GB of a worker for weights, optimizer and feature maps",
        *(f"note     {note}" for note in plan["notes"]),
        "Reading, evaluation and the start of each step are not counted: a minute or two for a small dataset.",
    ]
    console.print("\n".join(lines), soft_wrap=True)
