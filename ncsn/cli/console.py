"""The console of a command, and the progress of its steps."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress as Bars,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ncsn.progress import Progress

_LINE_EVERY_SECONDS = 30.0
_LINE_EVERY_SHARE = 0.25


class ProgressView:
    """Context manager that shows progress: bars on a terminal, a few lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._shown = 0, 0.0, 0.0  # units, their share, and the time of the last line
        self._bars = Bars(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            # Ray keeps the sys.stdout that it finds until the interpreter ends, so do not replace it.
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> ProgressView:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, step: str) -> None:
        """A step starts; its length is not known yet."""
        if self._console.is_terminal:
            self._tasks[step] = self._bars.add_task(step, total=None, text="starting")
        else:
            self._console.print(f"{step:<9} starting", highlight=False)
        self._shown = -1, 0.0, time.monotonic()

    def update(self, step: str, progress: Progress) -> None:
        """Show the progress that a step published."""
        text = f"{progress.done:,} / {progress.total:,} {progress.unit}"
        if progress.text:
            text += f"   {progress.text}"
        if self._console.is_terminal:
            self._bars.update(
                self._tasks[step], completed=progress.done, total=progress.total or None, text=text, refresh=True
            )
            return
        # A line at every quarter of a step and every half minute; never one for work repeated after a failure.
        done, share, then = self._shown
        now, reached = time.monotonic(), progress.done / progress.total if progress.total else 0.0
        if progress.done > done and (reached >= share + _LINE_EVERY_SHARE or now >= then + _LINE_EVERY_SECONDS):
            self._shown = progress.done, reached - reached % _LINE_EVERY_SHARE, now
            self._console.print(f"{step:<9} {text}", highlight=False)

    def finish(self, step: str, text: str) -> None:
        """A step ended with `text`."""
        if self._console.is_terminal:
            self._bars.remove_task(self._tasks.pop(step))
            self._bars.refresh()
        mark = "[green]✓[/] " if self._console.is_terminal else ""
        self._console.print(f"{mark}{step:<9} {text}", highlight=False, soft_wrap=True)


class ShownProgress(Progress):
    """The progress of a step in this process."""

    def __init__(self, view: ProgressView, step: str) -> None:
        super().__init__()
        self._view, self._step = view, step

    def changed(self) -> None:
        self._view.update(self._step, self)


_PLAIN_WIDTH = 120


def console_on(stream: TextIO) -> Console:
    """A console on `stream`, with a fixed width unless it is a terminal."""
    terminal = stream.isatty()
    return Console(file=stream, width=None if terminal else _PLAIN_WIDTH, highlight=False)


@contextmanager
def quiet_libraries(log: Path | None) -> Iterator[Console]:
    """Send all output of the block to `log`, or to stderr without one; yields a console on the stderr from before."""
    with ExitStack() as stack:
        own = sys.stderr
        if own is sys.__stderr__:
            own = stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1))
        target = own
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            target = stack.enter_context(log.open("a", buffering=1))
        # Threads of Ray and Arrow write to the descriptors, not through sys.stdout.
        stack.enter_context(_moved(1, target))
        stack.enter_context(_moved(2, target))
        stack.enter_context(redirect_stdout(target))
        stack.enter_context(redirect_stderr(target))
        yield console_on(own)


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
