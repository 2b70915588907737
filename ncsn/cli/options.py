"""What every command shares: options, errors and exit codes. Imports no package but click."""

from __future__ import annotations

import errno
import json
import os
import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, get_args

import click

from ncsn.answer import INTERRUPTED, answer
from ncsn.environment import DASHBOARD, BackendName
from ncsn.errors import Problem, UserError, problems_of
from ncsn.runs.steps import OWN, STEP_TABLE

FAILURE = 1
MISTAKE = 2  # the user's

HERE = "here"  # of --code

TRACEBACK_VARIABLE = "NCSN_TRACEBACK"
_TRACEBACK_KEY = "ncsn.traceback"
_EXTRA_CONFIG = re.compile(r"extra argument \((\S+\.ya?ml)\)")  # in click's message
_DISK_FULL = f"[Errno {errno.ENOSPC}]"


class StepFailed(Exception):
    """A step of `ncsn run` failed with `error`; `log` has the traceback."""

    def __init__(self, step: str, error: Exception, *, log: Path) -> None:
        super().__init__(f"step {step}: {error}")
        self.step, self.error, self.log = step, error, log


def describe(error: BaseException) -> tuple[tuple[Problem, ...], int]:
    """The problems to print and the exit code: a `UserError` or `InvalidValue` is a mistake of the user."""
    if isinstance(error, StepFailed):
        (first, *others), code = describe(error.error)
        first = replace(first, origin=": ".join(filter(None, (f"step {error.step}", first.origin))))
        return (first, *others), code
    message = str(error).strip()
    first_line = next((line.rstrip() for line in message.splitlines() if line.strip()), "")
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or _DISK_FULL in message:
        file = getattr(error, "filename", None)
        place = first_line or "no space left" if file is None else f"no space left to write {file}"
        return (Problem("", f"disk full: {place}"),), FAILURE
    if problems := problems_of(error):
        return problems, MISTAKE
    return (Problem("", ": ".join(filter(None, (type(error).__name__, first_line)))),), FAILURE


def _show(error: click.UsageError, _: object = None) -> None:
    """Say in one line what is wrong with the words of a command, where click adds its synopsis."""
    message = " ".join(error.format_message().split()).rstrip(".")
    hint, config = f"see `{error.ctx.command_path if error.ctx else 'ncsn'} --help`", _EXTRA_CONFIG.search(message)
    if config and error.ctx and any(param.name == "config_uri" for param in error.ctx.command.params):
        hint = f"did you mean --config {config[1]}?"
    click.echo(f"error: {message[0].lower()}{message[1:]}{click.style(f' ({hint})', dim=True)}", err=True)


click.UsageError.show = _show  # type: ignore[assignment, method-assign]  # of groups and commands alike


class ReportingCommand(click.Command):
    """A command that prints an error in one line on stderr, and its traceback on request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--traceback"],
                is_flag=True,
                envvar=TRACEBACK_VARIABLE,
                expose_value=False,
                callback=lambda ctx, _, value: ctx.meta.update({_TRACEBACK_KEY: value}),
                help="Show the full traceback of an error.",
            )
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit with the code of `describe` if it raises."""
        answer.install()
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:  # noqa: BLE001 - the one place where every error becomes a line and a code
            from ncsn.storage.heartbeat import LeaseExpired

            if isinstance(error, LeaseExpired):  # recorded; with exit code 0, no cluster starts the command again
                click.echo(str(error), err=True)
                ctx.exit(0)
            problems, code = describe(error)
            if with_traceback := ctx.meta.get(_TRACEBACK_KEY, False):
                traceback.print_exception(error)
            if ctx.params.get("as_json") and code == MISTAKE:
                cause = error.error if isinstance(error, StepFailed) else error
                found = [problem.to_json() for problem in problems_of(cause)]
                click.echo(json.dumps({"error": {"type": type(cause).__name__, "problems": found}}, indent=1))
            for problem in problems:
                hint = click.style(str(problem).removeprefix(problem.statement), dim=True) if problem.hint else ""
                click.echo(f"error: {problem.statement}{hint}", err=True)
            if isinstance(error, StepFailed):
                click.echo(f"({error.log} says more)", err=True)
            elif code == FAILURE and not with_traceback:
                click.echo(f"(--traceback or {TRACEBACK_VARIABLE}=1 shows where)", err=True)
            ctx.exit(code)


Decorated = Callable[..., Any]
_SET = "Change one value of the config; repeatable."
_NEW_RUN = "Name of the run; default: made from the config. Without --config, an existing run."


def target_options(command: Decorated, *, run_help: str = _NEW_RUN) -> Decorated:
    """`--config`, `--set`, `--run`, and `--backend`, `--address` and `--code` where the command has them: `options`."""

    @click.option("--config", "config_uri", metavar="PATH|URI", help="A YAML file, or an example such as digits.")
    @click.option("--set", "overrides", metavar="A.B=VALUE", multiple=True, help=_SET)
    @click.option("--run", "run_name", metavar="NAME", help=run_help)
    @wraps(command)
    def with_target_options(
        *,
        config_uri: str | None,
        overrides: tuple[str, ...],
        run_name: str | None,
        backend: str | None = None,
        address: str | None = None,
        code: str | None = None,
        **others: Any,
    ) -> Any:
        from ncsn.cli.target import TargetOptions

        if code not in (None, HERE):
            from ncsn.runs.code import run_code

            run_code(code)
        if address is not None and backend not in (None, "ray-jobs"):
            why = f"needs --backend ray-jobs, not {backend}"
            raise UserError("--address", why, hint="leave one out", value=address)
        elsewhere: tuple[str, ...] = () if backend is None else (f"compute.backend={backend}",)
        if address is not None:
            elsewhere = ("compute.backend=ray-jobs", f"compute.ray_jobs.address={address}")
        return command(options=TargetOptions(config_uri, overrides, run_name, elsewhere, code == HERE), **others)

    return with_target_options


existing_run_options = partial(target_options, run_help="An existing run, instead of --config.")
registry_options = partial(target_options, run_help="Use the registry of this run's config.")


def backend_options(command: Decorated) -> Decorated:
    """`--dashboard`, and `--backend` and `--address`, which `target_options` above this takes."""

    def ask(_: click.Context, __: click.Parameter, given: bool) -> None:  # noqa: FBT001 - click's
        if given:
            os.environ[DASHBOARD] = "1"

    shown = "Start the dashboard too, if this starts a Ray cluster here."
    command = click.option("--dashboard", is_flag=True, expose_value=False, callback=ask, help=shown)(command)
    words = "Where the work runs; short for --set compute.backend=..."
    address = click.option("--address", metavar="URL", help="Dashboard of the Ray cluster, http://HEAD:8265.")
    return click.option("--backend", type=click.Choice(get_args(BackendName)), help=words)(address(command))


code_option = click.option(
    "--code", metavar=f"{HERE}|URI", help="Run the code of this clone there; or of an archive that this made."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else on stdout."
)
ADDRESS = """ADDRESS, instead of --config or --run: models:/NAME@ALIAS, the name of a run, or the folder or URI of a
run, of a checkpoint or of a saved model."""


def step_options(command: Decorated, *, step: str) -> Decorated:
    declared = STEP_TABLE[step]
    if step == "sample":
        words = "Also write each image as a PNG file into this new or empty folder."
        command = click.option("--png", metavar="DIR", help=words)(command)
    command = code_option(json_option(command))
    if declared.workers:
        words = "Heartbeat of a launcher elsewhere: when it stops, save and end."
        command = backend_options(click.option("--lease", metavar="URI", hidden=True, help=words)(command))
    if declared.on_demand:
        words = "Show the Fréchet distance so far, with its interval, while images are made; URI: a dataset other than "
        words += "the run's."
        command = click.option("--score", is_flag=False, flag_value=OWN, metavar="[URI]", help=words)(command)
    if declared.addressed:  # not `address`, which is an option of `backend_options`
        command = click.argument("named", metavar="[ADDRESS]", required=False)(command)
    for name, source in reversed([*declared.inputs.items()]):
        words = f"The {source.what}; default: the run's own."
        command = click.option(f"--{name}", metavar="URI", help=words)(command)
    return target_options(command)
