"""Errors as one line and an exit code.

0 is success, 2 a user's mistake, 1 any other failure, 130 Ctrl-C and 143 SIGTERM.
"""

from __future__ import annotations

import errno
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click

FAILURE = 1
MISTAKE = 2
INTERRUPTED = 130
TERMINATED = 143

TRACEBACK_VARIABLE = "NCSN_TRACEBACK"
_TRACEBACK_KEY = "ncsn.traceback"
_DISK_FULL = f"[Errno {errno.ENOSPC}]"


class StepFailed(Exception):
    """A step failed in another process.

    Attributes:
        mistake: Whether it was a user's mistake.
        log: The file with its traceback.
    """

    def __init__(self, message: str, *, mistake: bool, log: Path) -> None:
        super().__init__(message)
        self.mistake = mistake
        self.log = log


@dataclass(frozen=True)
class Failure:
    """What to print, and the exit code."""

    lines: tuple[str, ...]
    code: int


def describe(error: BaseException) -> Failure:
    """The lines and the exit code for an error.

    A `ValueError` or a `FileNotFoundError` is a user's mistake and its message stands alone; of any other error the
    type is shown too. A message of several lines is one mistake per line for a mistake, else only the first is kept.
    """
    message = str(error).strip()
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or _DISK_FULL in message:
        return Failure((f"disk full: {_disk_full_place(error)}",), FAILURE)
    if isinstance(error, StepFailed):
        return Failure(_lines(message), MISTAKE if error.mistake else FAILURE)
    if isinstance(error, (ValueError, FileNotFoundError)):
        return Failure(_lines(message or type(error).__name__), MISTAKE)
    first = next(iter(_lines(message)), "")
    return Failure((f"{type(error).__name__}: {first}" if first else type(error).__name__,), FAILURE)


def _lines(message: str) -> tuple[str, ...]:
    return tuple(line.rstrip() for line in message.splitlines() if line.strip())


def _disk_full_place(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"no space left to write {error.filename}"
    return _lines(str(error))[0] if str(error).strip() else "no space left"


class ReportingCommand(click.Command):
    """A command whose errors are one line on stderr, unless the traceback was asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--traceback"],
                is_flag=True,
                envvar=TRACEBACK_VARIABLE,
                expose_value=False,
                callback=_remember_traceback,
                help="Show the whole traceback of an error.",
            )
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit with the code of `describe` if it raises."""
        stop_cleanly_on_sigterm()
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:  # noqa: BLE001 - the one place where every error becomes a line and a code
            ctx.exit(_report(error, with_traceback=ctx.meta.get(_TRACEBACK_KEY, False)))


def stop_cleanly_on_sigterm() -> None:
    """Make SIGTERM an exception, so that `finally` blocks stop what this process started."""
    signal.signal(signal.SIGTERM, _exit_on_sigterm)


def _report(error: Exception, *, with_traceback: bool) -> int:
    failure = describe(error)
    if with_traceback and not isinstance(error, StepFailed):
        traceback.print_exception(error)
    for line in failure.lines:
        click.echo(f"error: {line}", err=True)
    if isinstance(error, StepFailed):
        click.echo(f"({error.log} says more)", err=True)
    elif failure.code == FAILURE and not with_traceback:
        click.echo(f"(--traceback or {TRACEBACK_VARIABLE}=1 shows where)", err=True)
    return failure.code


def _remember_traceback(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's order
    ctx.meta[_TRACEBACK_KEY] = value


def _exit_on_sigterm(_number: int, _frame: FrameType | None) -> None:
    sys.exit(TERMINATED)
