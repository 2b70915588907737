"""Errors as one line and an exit code.

0 is success, 2 a user's mistake, 1 any other failure, 130 Ctrl-C and 143 SIGTERM.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

from ncsn.errors import Problem, problems_of

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
        step: Its name.
        kind: Name of the error's class.
        problems: What it said.
        mistake: Whether it was a user's mistake.
        log: The file with its traceback.
    """

    def __init__(self, step: str, problems: Sequence[Problem], *, kind: str, mistake: bool, log: Path) -> None:
        super().__init__(f"step {step}: " + "\n".join(map(str, problems)))
        self.step, self.kind, self.problems, self.mistake, self.log = step, kind, tuple(problems), mistake, log


@dataclass(frozen=True)
class Failure:
    """What to print, and the exit code."""

    problems: tuple[Problem, ...]
    code: int

    @property
    def lines(self) -> tuple[str, ...]:
        """One for each problem."""
        return tuple(map(str, self.problems))


def describe(error: BaseException) -> Failure:
    """The problems and the exit code of an error.

    A `UserError`, or any other `ValueError` or `FileNotFoundError`, is a user's mistake; each line of its message is a
    problem. Of any other error the type is shown, and the first line only.
    """
    message = str(error).strip()
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or _DISK_FULL in message:
        return Failure((Problem("", f"disk full: {_disk_full_place(error)}"),), FAILURE)
    if isinstance(error, StepFailed):
        first, *others = error.problems
        first = replace(first, origin=": ".join(filter(None, (f"step {error.step}", first.origin))))
        return Failure((first, *others), MISTAKE if error.mistake else FAILURE)
    if problems := problems_of(error):
        return Failure(problems, MISTAKE)
    first_line = next(iter(_lines(message)), "")
    return Failure((Problem("", ": ".join(filter(None, (type(error).__name__, first_line)))),), FAILURE)


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
            as_json = bool(ctx.params.get("as_json"))
            ctx.exit(_report(error, with_traceback=ctx.meta.get(_TRACEBACK_KEY, False), as_json=as_json))


def stop_cleanly_on_sigterm() -> None:
    """Make SIGTERM an exception, so that `finally` blocks stop what this process started."""
    signal.signal(signal.SIGTERM, _exit_on_sigterm)


def _report(error: Exception, *, with_traceback: bool, as_json: bool) -> int:
    failure = describe(error)
    if with_traceback and not isinstance(error, StepFailed):
        traceback.print_exception(error)
    if as_json and failure.code == MISTAKE:
        click.echo(json.dumps({"error": _as_json(error)}, indent=1))
    for problem in failure.problems:
        hint = click.style(str(problem).removeprefix(problem.statement), dim=True) if problem.hint else ""
        click.echo(f"error: {problem.statement}{hint}", err=True)
    if isinstance(error, StepFailed):
        click.echo(f"({error.log} says more)", err=True)
    elif failure.code == FAILURE and not with_traceback:
        click.echo(f"(--traceback or {TRACEBACK_VARIABLE}=1 shows where)", err=True)
    return failure.code


def _as_json(error: Exception) -> dict[str, Any]:
    if isinstance(error, StepFailed):
        kind, problems = error.kind, error.problems
    else:
        kind, problems = type(error).__name__, problems_of(error)
    return {"type": kind, "problems": [problem.to_json() for problem in problems]}


def _remember_traceback(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's order
    ctx.meta[_TRACEBACK_KEY] = value


def _exit_on_sigterm(_number: int, _frame: FrameType | None) -> None:
    sys.exit(TERMINATED)
