"""Keeps a command's own words apart from what libraries print."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from rich.console import Console

_PLAIN_WIDTH = 120


def console_on(stream: TextIO) -> Console:
    """A console on `stream`; wide enough for a path where there is no terminal to measure."""
    terminal = stream.isatty()
    return Console(file=stream, width=None if terminal else _PLAIN_WIDTH, highlight=False)


@contextmanager
def quiet_libraries(log: Path | None) -> Iterator[Console]:
    """Send everything that is printed in the block to `log`, or to stderr without one, at descriptor level.

    Ray's and Arrow's threads write to the descriptors and not through `sys.stdout`, so those are moved too.

    Yields:
        The console for the command's own words about progress, on the stderr from before.
    """
    with ExitStack() as stack:
        own = stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1)) if _is_process_stderr() else sys.stderr
        target = stack.enter_context(_open_log(log)) if log is not None else own
        stack.enter_context(_moved(1, target))
        stack.enter_context(_moved(2, target))
        stack.enter_context(redirect_stdout(target))
        stack.enter_context(redirect_stderr(target))
        yield console_on(own)


def _is_process_stderr() -> bool:
    return sys.stderr is sys.__stderr__


def _open_log(log: Path) -> TextIO:
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.open("a", buffering=1)


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
