"""The `ncsn` command. Imports are inside functions, so that `ncsn --help` does not wait for torch, Ray or MLflow."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ncsn.answer import answer
from ncsn.cli.options import (
    ADDRESS,
    ReportingCommand,
    backend_options,
    code_option,
    existing_run_options,
    json_option,
    step_options,
    target_options,
)
from ncsn.errors import UserError
from ncsn.process import reduce_gc, settle
from ncsn.runs.steps import STEP_TABLE, Step

if TYPE_CHECKING:
    from ncsn.cli.target import TargetOptions
    from ncsn.progress import Progress


# What people need first stands first; within a group, commands are in the order of work.
_GROUPS = {
    "Start": ("init", "run", "sample", "ui", "show-config", "plan", "doctor", "select", "export"),
    "Steps": (),  # the others of `STEP_TABLE`
    "Results": ("ls", "show", "promote", "serve", "cleanup"),
    "Cluster": ("submit",),
}
_OTHERS = ("cluster", "registry", "store")  # modules with commands; those of this one need none of them


def _groups() -> dict[str, tuple[str, ...]]:
    elsewhere = {name for names in _GROUPS.values() for name in names}
    return _GROUPS | {"Steps": tuple(step for step in STEP_TABLE if step not in elsewhere)}


class _Grouped(click.Group):
    """Lists its commands in `_GROUPS`, and loads other modules for one that is not here."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in STEP_TABLE and cmd_name not in self.commands:
            return _command_of(STEP_TABLE[cmd_name])
        if cmd_name not in self.commands:  # click also suggests those of others for a mistake
            for module in _OTHERS:
                for each in vars(import_module(f"ncsn.cli.{module}")).values():
                    if isinstance(each, click.Command):
                        self.add_command(each)
        return super().get_command(ctx, cmd_name)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return [name for names in _groups().values() for name in names]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group, names in _groups().items():
            with formatter.section(group):
                formatter.write_dl(
                    [(name, each.get_short_help_str(80)) for name in names if (each := self.get_command(ctx, name))]
                )


_HELP = """Noise conditional score networks: from images to a registered model that generates images.

\b
ncsn init photos/                              write a config for your own images
ncsn plan --config digits                      estimate time, memory and cost
ncsn run --config digits                       run the whole pipeline
ncsn show-config --config digits               explain every setting
ncsn sample --run NAME --set sampling.seed=1   run one step again
"""


@click.group(cls=_Grouped, help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ncsn", message="%(version)s")
def app() -> None:
    """The `ncsn` command."""


def main() -> None:
    reduce_gc()
    settle()
    try:
        app(prog_name="ncsn")
    finally:
        answer.leave()


_MINUTES = 20.0  # of a run that `init` plans


@app.command("init", cls=ReportingCommand, short_help="Write a config for your own images.")
@click.argument("place", metavar="PLACE")
@click.option("--out", metavar="FILE", help="The file to write; default: NAME.yaml here. It must not exist.")
@click.option("--minutes", type=click.FloatRange(min=1), help=f"Target length of the run; default: {_MINUTES:.0f}.")
@click.option("--set", "overrides", metavar="A.B=VALUE", multiple=True, help="Set one value of the config; repeatable.")
@json_option
def init_command(
    *, place: str, out: str | None, minutes: float | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Look at the images in PLACE, choose every setting, and write a config that `ncsn run` takes.

    PLACE is a folder, an s3:// prefix, a .tar, .zip or .parquet file, or the name of an example, such as digits. The
    choices fit the images, this machine and the length of the run. Of more than 4,096 images it looks at a sample. The
    reasons are in the file, and a picture next to it shows what training will see.
    """
    from ncsn.init import write

    if write.is_example(place):
        written = write.copy_example(place, out, given="--set" if overrides else "--minutes" if minutes else "")
    else:
        seconds = 60 * (minutes or _MINUTES)
        if not seconds < math.inf:
            raise UserError("--minutes", "not a length of time", value=minutes)
        few = "These are too few to learn a class: {}. Leave them out?"
        questions = write.Questions(_looking)
        if sys.stdin.isatty() and sys.stdout.isatty():
            questions = write.Questions(_looking, lambda classes: click.confirm(few.format(classes)), _ask_mirrored)
        written = write.from_images(place, out, seconds=seconds, overrides=overrides, questions=questions)
    if as_json:
        click.echo(json.dumps(written.to_json(), indent=1))
        return
    for word, text in written.lines:
        click.echo(f"{word:<9} {text}")


@contextmanager
def _looking() -> Iterator[Progress | None]:
    """Shows the progress of a look at all images, on a terminal."""
    from ncsn.cli.console import ProgressView, ShownProgress, console_on

    view = ProgressView(console_on(sys.stderr))
    with view.bars:
        if view.console.is_terminal:
            view.start("look")
        yield ShownProgress(view, "look") if view.console.is_terminal else None


def _ask_mirrored(png: bytes, default: bool) -> bool:  # noqa: FBT001 - `Callable` knows no keywords
    from ncsn.cli.console import console_on, picture
    from ncsn.init.write import REALISTIC

    if (console := console_on(sys.stdout)).is_terminal:
        console.print(picture(png))
    return click.confirm(f"The lower images are mirrored. Are they still realistic? ({REALISTIC})", default=default)


@app.command("run", cls=ReportingCommand, short_help="Run the whole pipeline, or its remaining steps.")
@target_options
@backend_options
@code_option
@json_option
@click.option("--finish", is_flag=True, help="Train no further: make the model of what an interrupted run has trained.")
def run_command(*, options: TargetOptions, as_json: bool, finish: bool) -> None:
    """Run the whole pipeline: ingest, train, sample, evaluate, register, report; search and utility if asked for.

    The same command again resumes an interrupted run, and repeats nothing that is done.
    """
    from ncsn.cli.run import run_pipeline

    run_pipeline(options.resolve(), code_here=options.code_here, as_json=as_json, finish=finish)


def _do_step(
    step: str,
    *,
    options: TargetOptions,
    as_json: bool,
    named: str | None = None,
    png: str | None = None,
    **given: str | None,
) -> None:
    from ncsn import storage
    from ncsn.cli.console import describe_result
    from ncsn.cli.run import run_step

    if png:
        storage.require_output("--png", str(Path(png).absolute()))
    run = options.resolve(named)
    if run.checkpoint is not None:
        if step != "sample":
            raise UserError("ADDRESS", f"names a checkpoint, but `{step}` is of a run", hint="name it", value=named)
        given["checkpoint"] = run.checkpoint
    here = run.config.compute.backend == "local" and "RAY_ADDRESS" not in os.environ
    if step == "utility" and here and not given.get("lease"):
        from ncsn.init.plan import utility_line

        if line := utility_line(run.config, run.name):
            click.echo(line, err=True)
    result = run_step(step, run, code_here=options.code_here, given=given)
    if png:
        from ncsn.data.samples import write_pngs

        write_pngs(result.uri, Path(png), num_images=result.num_images)
    click.echo(json.dumps(result.plain(), indent=1) if as_json else describe_result(result, run.config, png=png))


def _command_of(step: Step) -> click.Command:
    """The command of a step that has none of its own."""
    words = f"{step.summary}\n\n{ADDRESS}" if step.addressed else step.summary
    work = step_options(partial(_do_step, step.name), step=step.name)
    return click.command(step.name, cls=ReportingCommand, help=words, short_help=step.summary)(work)


@app.command("show-config", cls=ReportingCommand, short_help="Print every setting with its meaning and range.")
@existing_run_options
@json_option
def show_config_command(*, options: TargetOptions, as_json: bool) -> None:
    """Print the resolved config, each setting with its meaning and range. The output is a valid config file.

    Where noise = auto and the run has its dataset, it begins with the levels that were chosen.
    """
    from ncsn.config import to_json
    from ncsn.init.draft import documented_yaml

    run = options.resolve(asking=False)
    if not as_json and run.config.noise.kind == "auto":
        from ncsn.init.plan import chosen_levels

        click.echo("".join(f"# {line}\n" for line in chosen_levels(run.config, run.name)), nl=False)
    click.echo(to_json(run.config) if as_json else documented_yaml(run.config), nl=as_json)


@app.command("plan", cls=ReportingCommand, short_help="Estimate what training and sampling will take.")
@target_options
@json_option
def plan_command(*, options: TargetOptions, as_json: bool) -> None:
    """Estimate the time of training and sampling, and the memory of a worker, by a few steps on this machine."""
    from ncsn.cli.console import console_on, print_plan
    from ncsn.init.plan import plan

    run = options.resolve(asking=False)
    found = plan(run.config, run.name)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        print_plan(console_on(sys.stdout), found)


@app.command("select", cls=ReportingCommand, short_help="Find the best checkpoint of a run by samples of each.")
@partial(step_options, step="select")
def select_command(*, options: TargetOptions, as_json: bool, **given: str | None) -> None:
    """Score every kept checkpoint and average by a few samples; then sample, evaluate and register the best one.

    The section select of the config says how. Training keeps checkpoints with train.keep_checkpoints=all.
    """
    from ncsn.cli.run import run_select

    run_select(options.resolve(), code_here=options.code_here, given=given, as_json=as_json)


@app.command("export", cls=ReportingCommand, short_help=STEP_TABLE["export"].summary)
@partial(step_options, step="export")
@click.option("--per-class", metavar="N", type=click.IntRange(min=1), help="Images of each class.")
@click.option("--class", "quotas", metavar="NAME=N", multiple=True, help="Images of this class; repeatable.")
@click.option("--fill", is_flag=True, help="Complete each class of the training images to the largest.")
@click.option("--num-images", metavar="N", type=click.IntRange(min=1), help="Images of a model without classes.")
@click.option("--format", type=click.Choice(["png", "parquet"]), help="Files to write; default: png.")
@click.option("--out", metavar="DIR|URI", help="New or empty folder; default: in the run's folder.")
def export_command(*, options: TargetOptions, quotas: tuple[str, ...], out: str | None, **given: Any) -> None:
    """Write a data set of generated images, without copies of training images.

    ADDRESS, instead of --config or --run: models:/NAME@ALIAS, the name of a run, or its folder or URI. The options are
    short for settings of the section export.
    """
    wish = {name: given.pop(name) for name in ("per_class", "fill", "num_images", "format")}
    wish |= {"classes": {}, "out": str(Path(out).absolute()) if out and "://" not in out else out}
    for quota in quotas:
        name, _, count = quota.rpartition("=")
        if not name or not count.isdecimal() or len(count) > 9:
            raise UserError("--class", "is not NAME=N", hint="such as --class crack=2000", value=quota)
        wish["classes"][name] = int(count)
    # As YAML reads it, whose escapes have other surrogates.
    changes = [f"export.{name}={json.dumps(value, ensure_ascii=False)}" for name, value in wish.items() if value]
    _do_step("export", options=replace(options, overrides=(*options.overrides, *changes)), **given)
