"""What every command shares: options, errors and exit codes, the table of steps. Imports click only.

0 is success, 2 a user's mistake, 1 any other failure, 130 Ctrl-C and 143 SIGTERM.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

from ncsn.errors import Problem, UserError, problems_of

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


OWN = "own"
"""Instead of a URI: that of the run."""


@dataclass(frozen=True)
class Source:
    """Where an input comes from if no option names it: a field of the result of an earlier step of the same run."""

    step: str
    field: str
    what: str


@dataclass(frozen=True)
class StepInfo:
    """One step.

    Attributes:
        summary: What it does, one line.
        inputs: Argument of the step -> where its URI comes from.
        on_demand: The same for what is used only if an option of that name is given, with a URI or without.
        leased: Whether it may run on another machine and then watches its launcher's lease.
        rehearsed: Whether failures can be injected.
    """

    summary: str
    inputs: Mapping[str, Source] = field(default_factory=dict)
    on_demand: Mapping[str, Source] = field(default_factory=dict)
    leased: bool = False
    rehearsed: bool = False


CATALOGUE: Mapping[str, StepInfo] = {
    "ingest": StepInfo("Read the images into the store, once."),
    "tune": StepInfo(
        "Search for better settings, if the config has a search.",
        {"dataset": Source("ingest", "uri", "ingested data set")},
        leased=True,
    ),
    "train": StepInfo(
        "Train the score network, or resume it.",
        {"dataset": Source("ingest", "uri", "ingested data set")},
        leased=True,
        rehearsed=True,
    ),
    "sample": StepInfo(
        "Generate images by annealed Langevin dynamics.",
        {"checkpoint": Source("train", "checkpoint", "checkpoint")},
        on_demand={"score": Source("ingest", "uri", "ingested data set")},
        leased=True,
        rehearsed=True,
    ),
    "evaluate": StepInfo(
        "Measure the samples, next to real images.",
        {
            "samples": Source("sample", "uri", "folder of samples"),
            "dataset": Source("ingest", "uri", "ingested data set"),
        },
        leased=True,
    ),
    "register": StepInfo(
        "Put the model into MLflow's registry.",
        {
            "checkpoint": Source("train", "checkpoint", "checkpoint"),
            "evaluation": Source("evaluate", "uri", "evaluation that decides about the alias champion"),
        },
    ),
    "report": StepInfo(
        "Write one HTML page about the run.", {"evaluation": Source("evaluate", "uri", "evaluation to report on")}
    ),
}

BESIDE_THE_PIPELINE: Mapping[str, StepInfo] = {
    "figures": StepInfo(
        "Draw a finished run: losses, levels, inpainting, interpolation, neighbours, quality over NFE.",
        {
            "checkpoint": Source("train", "checkpoint", "checkpoint"),
            "samples": Source("sample", "uri", "folder of samples"),
            "dataset": Source("ingest", "uri", "ingested data set"),
        },
    ),
}
"""Commands that work like steps on what the pipeline left."""


Decorated = Callable[..., Any]


def experiment_options(command: Decorated) -> Decorated:
    """`--config`, `--set` and `--run`: which experiment."""
    for option in (
        click.option("--run", "run_name", metavar="NAME", help="Name of the run; default: made from the config."),
        click.option(
            "--set", "overrides", metavar="A.B=VALUE", multiple=True, help="Change one value of the config; repeatable."
        ),
        click.option("--config", "config_uri", metavar="PATH|URI", help="The experiment, a YAML file."),
    ):
        command = option(command)
    return command


def backend_options(command: Decorated) -> Decorated:
    """`--backend` and `--address`: where the step runs."""
    for option in (
        click.option("--address", metavar="URL", help="Dashboard of the Ray cluster to submit to: http://HEAD:8265."),
        click.option(
            "--backend",
            type=click.Choice(["local", "ray-jobs", "kuberay"]),
            help="Where the work is done; short for --set compute.backend=...",
        ),
    ):
        command = option(command)
    return command


def place_overrides(backend: str | None, address: str | None) -> tuple[str, ...]:
    """The overrides that `--backend` and `--address` stand for.

    Raises:
        UserError: if the backend has no use for an address.
    """
    if address is not None and backend not in (None, "ray-jobs"):
        raise UserError(
            "--address", f"is for --backend ray-jobs, and --backend is {backend}", hint="leave one out", value=address
        )
    if address is not None:
        return ("compute.backend=ray-jobs", f"compute.ray_jobs.address={address}")
    return () if backend is None else (f"compute.backend={backend}",)


def json_option(command: Decorated) -> Decorated:
    """`--json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else on stdout."
    )(command)


def inject_option(command: Decorated) -> Decorated:
    """`--inject`."""
    return click.option(
        "--inject",
        multiple=True,
        metavar="FAULT@images=N",
        help="Rehearse a failure, such as kill-worker@images=5000; repeatable; docs/guide.md lists them.",
    )(command)


def score_option(command: Decorated) -> Decorated:
    """`--score`, with the URI of a data set or without."""
    return click.option(
        "--score",
        is_flag=False,
        flag_value=OWN,
        metavar="[URI]",
        help="Show the Frechet distance so far, with its interval, while images are made; against the run's own data "
        "set, or this.",
    )(command)
