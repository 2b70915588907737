"""The commands beside the steps. Their imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import click

from ncsn.cli.options import BESIDE_THE_PIPELINE, Decorated, ReportingCommand, experiment_options, json_option
from ncsn.errors import UserError

if TYPE_CHECKING:
    from rich.tree import Tree

    from ncsn.cli.target import Target
    from ncsn.tracking.lineage import Link
    from ncsn.tracking.promotion import AliasChange


class Change(TypedDict):
    """Options of the commands that move an alias."""

    dry_run: bool
    config_uri: str | None
    overrides: tuple[str, ...]
    run_name: str | None
    as_json: bool


def _change_options(command: Decorated) -> Decorated:
    dry_run = click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
    return dry_run(experiment_options(json_option(command)))


@click.command("promote", cls=ReportingCommand, short_help="Make a registered version champion.")
@click.argument("model")
@click.option("--version", metavar="N", help="Which version; default: the challenger.")
@click.option("--force", is_flag=True, help="Whatever the gate says.")
@_change_options
def promote_command(*, model: str, version: str | None, force: bool, **asked: Unpack[Change]) -> None:
    """Make a version of MODEL champion, if its recorded figure passes the gate against the present champion."""
    from ncsn.tracking.promotion import promote_version

    _change(partial(promote_version, name=model, version=version, force=force), asked)


@click.command("rollback", cls=ReportingCommand, short_help="Make the champion before the present one champion again.")
@click.argument("model")
@_change_options
def rollback_command(*, model: str, **asked: Unpack[Change]) -> None:
    """Make the champion of MODEL before the present one champion again; repeated, it goes further back."""
    from ncsn.tracking.promotion import roll_back

    _change(partial(roll_back, name=model), asked)


def _change(change: Callable[..., AliasChange], asked: Change) -> None:
    """Call `change` on the registry that is asked for, and print what it did."""
    from ncsn.cli.target import registry_uri
    from ncsn.tracking.client import open_client_at
    from ncsn.tracking.versions import registry_errors

    uri = registry_uri(asked["config_uri"], overrides=asked["overrides"], run=asked["run_name"])
    with registry_errors(uri):
        done = change(open_client_at(uri), dry_run=asked["dry_run"])
    if asked["as_json"]:
        click.echo(json.dumps(dataclasses.asdict(done), indent=1))
        return
    verb = "would become" if done.dry_run and done.changed else "is"
    instead = f" in place of version {done.replaced}" if done.changed and done.replaced else ""
    click.echo(f"{done.model} version {done.version} {verb} champion{instead}: {done.reason}")


@click.command("export", cls=ReportingCommand, short_help="Write EMA weights as one safetensors file.")
@click.option("--out", required=True, metavar="FILE", help="The file to write.")
@click.option("--checkpoint", metavar="URI", help="Of this checkpoint.")
@click.option("--model", metavar="URI", help="Of this registered model: models:/NAME@champion or models:/NAME/VERSION.")
@experiment_options
@json_option
def export_command(
    *,
    out: str,
    checkpoint: str | None,
    model: str | None,
    config_uri: str | None,
    overrides: tuple[str, ...],
    run_name: str | None,
    as_json: bool,
) -> None:
    """Write EMA weights as one safetensors file, with the config as its metadata.

    They are those of --checkpoint, of --model, or of the last checkpoint of --run.
    """
    from ncsn import storage
    from ncsn.cli.target import registry_uri, resolve
    from ncsn.runs.folder import run_folder
    from ncsn.runs.records import read_result
    from ncsn.tools import models

    if checkpoint is not None and model is not None:
        raise click.UsageError("give --checkpoint or --model, not both")
    if model is not None:
        registry = registry_uri(config_uri, overrides=overrides, run=run_name)
        result = models.from_model(model, registry=registry, out=out)
    elif checkpoint is not None:
        result = models.from_checkpoint(storage.absolute(checkpoint), out=out)
    else:
        target = resolve(config_uri, overrides=overrides, run=run_name)
        trained = read_result(run_folder(target.config, target.run), "train")
        if trained is None:
            raise UserError(
                "--checkpoint",
                f"run {target.run!r} is not trained yet",
                hint="run `ncsn train` first, or pass --checkpoint URI",
            )
        result = models.from_checkpoint(str(trained.result["checkpoint"]), out=out)
    values = dataclasses.asdict(result)
    click.echo(json.dumps(values, indent=1) if as_json else f"{result.parameters:,} EMA weights: {result.uri}")


def model_options(command: Decorated) -> Decorated:
    """`--model` and `--out` of `ncsn sample`."""
    for option in (
        click.option("--out", metavar="FOLDER", help="With --model: where the images go."),
        click.option("--model", metavar="URI", help="A registered model in place of a run: models:/NAME@champion."),
    ):
        command = option(command)
    return command


def sample_from_model(
    given: Mapping[str, str | None],
    *,
    config_uri: str | None,
    overrides: tuple[str, ...],
    run_name: str | None,
    as_json: bool,
) -> None:
    """Generate images from a registered model and print where they are.

    Args:
        given: The options of `ncsn sample`: `model`, perhaps `out`.
        config_uri: With `overrides` and `run_name`: where the registry is.
        overrides: Also changes of the registered config.
        run_name: See `config_uri`.
        as_json: Print JSON.
    """
    from ncsn.cli.console import ProgressView, quiet_libraries
    from ncsn.cli.target import registry_uri, store_root
    from ncsn.runs.records import StepProgress
    from ncsn.tools import models

    address = given.get("model")
    if address is None:
        raise click.UsageError("--out goes with --model; the samples of a run lie in the run's folder")
    if given.get("checkpoint"):
        raise click.UsageError("give --checkpoint or --model, not both")
    registry = registry_uri(config_uri, overrides=overrides, run=run_name)
    with quiet_libraries(None) as console, ProgressView(console) as view:
        view.start("sample")
        result = models.sample_model(
            address,
            registry=registry,
            root=store_root(overrides),
            out=given.get("out"),
            overrides=overrides,
            progress=lambda done, total: view.update("sample", StepProgress(done, total, "images")),
        )
        view.finish("sample", f"done in {result.seconds:,.1f} s")
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=1))
    else:
        click.echo(f"sample: {result.num_images:,} images of {result.model}, {result.nfe:,} network evaluations each")
        click.echo(f"uri: {result.uri}\ngrid: {result.grid}")


@click.command("suggest-noise", cls=ReportingCommand, short_help="Choose noise levels and a step size from the images.")
@click.option("--config", "config_uri", metavar="PATH|URI", help="The experiment whose source is looked at.")
@click.option("--set", "overrides", metavar="A.B=VALUE", multiple=True, help="Change one value of the config.")
@click.option("--data", "dataset", metavar="URI", help="An ingested data set to look at instead.")
@click.option("--mirrored", is_flag=True, help="Count mirrored images too; with --config data.horizontal_flip decides.")
@click.option("--sigma-L", "sigma_last", default=0.01, show_default=True, help="Smallest sigma, pixels in [0, 1].")
@click.option("--overlap", default=0.5, show_default=True, help="Overlap C of neighbouring levels; published: 0.567.")
@click.option("--steps-per-level", default=5, show_default=True, type=click.IntRange(1), help="Langevin steps T.")
@json_option
def suggest_noise_command(
    *,
    config_uri: str | None,
    overrides: tuple[str, ...],
    dataset: str | None,
    mirrored: bool,
    sigma_last: float,
    overlap: float,
    steps_per_level: int,
    as_json: bool,
) -> None:
    """Print YAML for a config, by techniques 1, 2 and 4 of NCSNv2.

    sigma_1 is the largest distance between two images, of up to 60,000; the ratio of neighbouring levels makes them
    overlap; and epsilon leaves the right variance after T steps.
    """
    from ncsn.cli.target import resolve
    from ncsn.cli.views import describe_suggestion
    from ncsn.model import build
    from ncsn.tools import preparation

    if (config_uri is None) == (dataset is None):
        raise UserError("--config", "pass either this or --data", hint="--data takes the URI of an ingested dataset")
    space = preparation.UNIT
    if dataset is not None:
        sample = preparation.images_of_dataset(dataset)
    else:
        data = resolve(config_uri, overrides=overrides).config.data
        space = build.pixel_space(data)
        sample, mirrored = preparation.images_of_source(data), mirrored or data.horizontal_flip
    found = preparation.suggest_levels(
        sample, mirrored=mirrored, sigma_L=sigma_last, overlap=overlap, steps_per_level=steps_per_level, space=space
    )
    click.echo(json.dumps(dataclasses.asdict(found), indent=1) if as_json else describe_suggestion(found))


@click.command("import-checkpoint", cls=ReportingCommand, short_help="Go on from a released checkpoint of NCSN(v2).")
@click.argument("file", metavar="FILE", type=click.Path(exists=True, dir_okay=False))
@experiment_options
@click.option("--dataset", metavar="URI", help="The ingested data set; default: the run's own.")
@json_option
def import_checkpoint_command(
    *,
    file: str,
    config_uri: str | None,
    overrides: tuple[str, ...],
    run_name: str | None,
    dataset: str | None,
    as_json: bool,
) -> None:
    """Read checkpoint.pth of the authors' code, strictly and without running anything in it, as a run's training.

    `ncsn sample` samples from it, and `ncsn train` goes on from it until train.num_images.
    """
    from ncsn.cli.target import find_inputs, resolve
    from ncsn.cli.views import describe_import
    from ncsn.runs.folder import run_folder
    from ncsn.tools import preparation

    target = resolve(config_uri, overrides=overrides, run=run_name)
    inputs = find_inputs(run_folder(target.config, target.run), "train", {"dataset": dataset})
    result = preparation.import_checkpoint(target.config, run=target.run, file=file, **inputs)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=1))
    else:
        click.echo(describe_import(target.run, result.checkpoint, result.images_seen, target.config.train.num_images))


@click.command("toy", cls=ReportingCommand, short_help="Make the paper's two-dimensional Figures 2 and 3.")
@click.option("--out", metavar="FOLDER", help="Folder or URI for the files; default: toy in the default store.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1), help="Of data and noise.")
@json_option
def toy_command(*, out: str | None, seed: int, as_json: bool) -> None:
    """Learn the score of a mixture of two Gaussians, and sample with plain and annealed Langevin dynamics.

    Plain Langevin dynamics leaves the two modes at half of the points each, annealed finds their weights.
    """
    from ncsn import storage
    from ncsn.cli.target import DEFAULT_ROOT
    from ncsn.cli.views import describe_toy
    from ncsn.tools import toy

    result = dataclasses.asdict(toy.run(out or storage.join(DEFAULT_ROOT, "toy"), seed=seed))
    click.echo(json.dumps(result, indent=1) if as_json else describe_toy(result))


def _input_options(step: str) -> Decorated:
    def decorate(command: Decorated) -> Decorated:
        for name, source in reversed(list(BESIDE_THE_PIPELINE[step].inputs.items())):
            command = click.option(f"--{name}", metavar="URI", help=f"The {source.what}; default: the run's own.")(
                command
            )
        return command

    return decorate


@click.command(
    "figures", cls=ReportingCommand, short_help="Draw a finished run.", help=BESIDE_THE_PIPELINE["figures"].summary
)
@experiment_options
@_input_options("figures")
@click.option("--nfe", metavar="N,N,...", help="Evaluations per image in the curve of quality over NFE.")
@click.option("--num-images", type=int, help="Images behind each of its points.")
@click.option("--out", metavar="FOLDER", help="Folder or URI for the files; default: report in the run's folder.")
@json_option
def figures_command(
    *,
    config_uri: str | None,
    overrides: tuple[str, ...],
    run_name: str | None,
    as_json: bool,
    nfe: str | None,
    num_images: int | None,
    out: str | None,
    **given: str | None,
) -> None:
    """Draw a finished run."""
    from ncsn.cli.execute import run_step
    from ncsn.cli.target import resolve

    target = resolve(config_uri, overrides=overrides, run=run_name, checkpoint=given.get("checkpoint"))
    chosen = {"nfe": _numbers("--nfe", nfe) if nfe else None, "num_images": num_images, "out": out}
    settings = {name: value for name, value in chosen.items() if value is not None}
    run_step("figures", target, given=given, settings=settings, as_json=as_json)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(option, "expected whole numbers with commas, such as 10,20,50", value=text) from None


@click.command("plan", cls=ReportingCommand, short_help="Say what a run will take before it starts.")
@experiment_options
@click.option("--prices", "prices_uri", metavar="PATH|URI", help="A price table; default: the package's prices.yaml.")
@click.option("--actual", is_flag=True, help="Rehearse nothing: show what the run has taken beside its plan.")
@json_option
def plan_command(
    *,
    config_uri: str | None,
    overrides: tuple[str, ...],
    run_name: str | None,
    prices_uri: str | None,
    actual: bool,
    as_json: bool,
) -> None:
    """Say what a run will take: hours, memory, storage, money and energy of each step.

    Runs every step on a few images in a temporary store, in about a minute.
    """
    from ncsn.cli.console import console_on
    from ncsn.cli.target import resolve
    from ncsn.cli.views import print_ledger, print_plan

    target = resolve(config_uri, overrides=overrides, run=run_name)
    if actual:
        from ncsn.runs.costs import account

        found = account(target.config, run=target.run)
    else:
        found = _rehearsed(target, prices_uri)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        (print_ledger if actual else print_plan)(console_on(sys.stdout), found)


def _rehearsed(target: Target, prices_uri: str | None) -> dict[str, Any]:
    from ncsn.cli.console import quiet_libraries
    from ncsn.cli.execute import work_folder
    from ncsn.runs.costs import load_prices
    from ncsn.runs.folder import run_folder

    prices = load_prices(prices_uri)
    log = work_folder(run_folder(target.config, target.run)) / "plan.log"
    with quiet_libraries(log) as console:
        console.print(f"log    {log}\nrehearsal", soft_wrap=True)
        from ncsn.tools import trial_run

        return trial_run.run(
            target.config, run=target.run, prices=prices, report=lambda part: console.print(f"       {part}")
        )


@click.command("trace", cls=ReportingCommand, short_help="Print where something came from and what came of it.")
@click.argument("identifier", metavar="ID")
@experiment_options
@json_option
def trace_command(
    *, identifier: str, config_uri: str | None, overrides: tuple[str, ...], run_name: str | None, as_json: bool
) -> None:
    """Print the whole chain that ID is part of: pipeline run, steps, Ray jobs, data, checkpoint, samples, model.

    ID is an MLflow run id, the name of a run, a KFP run id, a Ray job or submission id, a model version
    (models:/NAME/3 or models:/NAME@champion), a dataset digest or its beginning, or the URI of a checkpoint.
    """
    from ncsn.cli.console import console_on
    from ncsn.cli.target import registry_uri
    from ncsn.tracking.client import open_client_at
    from ncsn.tracking.lineage import trace
    from ncsn.tracking.versions import registry_errors

    uri = registry_uri(config_uri, overrides=overrides, run=run_name)
    with registry_errors(uri):
        chains = trace(open_client_at(uri), identifier)
    if as_json:
        click.echo(json.dumps({"id": identifier, "chains": [dataclasses.asdict(chain) for chain in chains]}, indent=1))
        return
    console = console_on(sys.stdout)
    for chain in chains:
        console.print(_tree(chain), soft_wrap=True)


def _tree(link: Link) -> Tree:
    from rich.markup import escape
    from rich.tree import Tree

    mark = "  [bold]<- asked for[/]" if link.asked else ""
    tree = Tree(f"[bold]{link.kind}[/] {escape(link.id)}{mark}")
    for name, value in link.facts.items():
        tree.add(f"[dim]{name.replace('_', ' ')}:[/] {escape(value)}")
    for below in link.links:
        tree.children.append(_tree(below))
    return tree
