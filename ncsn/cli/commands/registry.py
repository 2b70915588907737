"""The commands for registered models, also as a source of samples. Imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ncsn.cli.options import Decorated, ReportingCommand, experiment_options, json_option, registry_options
from ncsn.errors import UserError

if TYPE_CHECKING:
    from rich.tree import Tree

    from ncsn.cli.target import Experiment
    from ncsn.tracking.lineage import Link
    from ncsn.tracking.promotion import AliasChange


def _change_options(command: Decorated) -> Decorated:
    dry_run = click.option("--dry-run", is_flag=True, help="Print what would change, and change nothing.")
    return dry_run(registry_options(json_option(command)))


@click.command("promote", cls=ReportingCommand, short_help="Make a registered version the champion.")
@click.argument("model")
@click.option("--version", metavar="N", help="Version to promote; default: the challenger.")
@click.option("--force", is_flag=True, help="Promote even if the gate objects.")
@_change_options
def promote_command(*, model: str, **options: Any) -> None:
    """Make a version of MODEL the champion, if its recorded metric passes the gate against the current champion."""
    from ncsn.tracking.promotion import promote_version

    _change(promote_version, name=model, **options)


@click.command("rollback", cls=ReportingCommand, short_help="Restore the previous champion.")
@click.argument("model")
@_change_options
def rollback_command(*, model: str, **options: Any) -> None:
    """Restore the previous champion of MODEL. Run again, it goes further back."""
    from ncsn.tracking.promotion import roll_back

    _change(roll_back, name=model, **options)


def _change(change: Callable[..., AliasChange], experiment: Experiment, *, as_json: bool, **options: Any) -> None:
    """Call `change` with a client of the registry and these options, and print the result."""
    from ncsn.tracking.client import open_client_at
    from ncsn.tracking.versions import registry_errors

    uri = experiment.registry
    with registry_errors(uri):
        done = change(open_client_at(uri), **options)
    verb = "would become" if done.dry_run and done.changed else "is"
    instead = f" in place of version {done.replaced}" if done.changed and done.replaced else ""
    text = f"{done.model} version {done.version} {verb} champion{instead}: {done.reason}"
    click.echo(json.dumps(asdict(done), indent=1) if as_json else text)


@click.command("trace", cls=ReportingCommand, short_help="Print where something came from and what came of it.")
@click.argument("identifier", metavar="ID")
@registry_options
@json_option
def trace_command(*, identifier: str, experiment: Experiment, as_json: bool) -> None:
    """Print the whole chain that ID is part of: pipeline run, steps, Ray jobs, data, checkpoint, samples, model.

    ID is an MLflow run id, the name of a run, a KFP run id, a Ray job or submission id, a model version
    (models:/NAME/3 or models:/NAME@champion), a dataset digest or its beginning, or the URI of a checkpoint.
    """
    from ncsn.cli.console import console_on
    from ncsn.tracking.client import open_client_at
    from ncsn.tracking.lineage import trace
    from ncsn.tracking.versions import registry_errors

    uri = experiment.registry
    with registry_errors(uri):
        chains = trace(open_client_at(uri), identifier)
    if as_json:
        click.echo(json.dumps({"id": identifier, "chains": [asdict(chain) for chain in chains]}, indent=1))
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


@click.command("export", cls=ReportingCommand, short_help="Write EMA weights as one safetensors file.")
@click.option("--out", required=True, metavar="FILE", help="The file to write.")
@click.option("--checkpoint", metavar="URI", help="The weights of this checkpoint.")
@click.option(
    "--model",
    metavar="URI",
    help="The weights of this registered model: models:/NAME@champion or models:/NAME/VERSION.",
)
@experiment_options
@json_option
def export_command(
    *, out: str, checkpoint: str | None, model: str | None, experiment: Experiment, as_json: bool
) -> None:
    """Write EMA weights as one safetensors file, with the config as its metadata.

    They come from --checkpoint, from --model, or from --run: the checkpoint that `ncsn select`
    chose, else the last.
    """
    from ncsn import storage
    from ncsn.runs.folder import run_folder
    from ncsn.runs.inputs import default_checkpoint
    from ncsn.runs.records import read_result
    from ncsn.tools import models

    if checkpoint is not None and model is not None:
        raise click.UsageError("give --checkpoint or --model, not both")
    if model is not None:
        result = models.from_model(model, registry=experiment.registry, out=out)
    elif checkpoint is not None:
        result = models.from_checkpoint(storage.absolute(checkpoint), out=out)
    else:
        target = experiment.resolve()
        folder = run_folder(target.config, target.run)
        trained = read_result(folder, "train")
        if trained is None:
            raise UserError(
                "--checkpoint",
                f"run {target.run!r} is not trained yet",
                hint="run `ncsn train` first, or pass --checkpoint URI",
            )
        chosen = default_checkpoint(folder, target.config, last=str(trained.result["checkpoint"]))
        result = models.from_checkpoint(chosen, out=out)
    text = f"{result.parameters:,} EMA weights: {result.uri}"
    click.echo(json.dumps(asdict(result), indent=1) if as_json else text)


def model_options(command: Decorated) -> Decorated:
    """`--model` and `--out` of `ncsn sample`."""
    out = click.option("--out", metavar="FOLDER", help="With --model: where the images go.")
    model = click.option("--model", metavar="URI", help="A registered model instead of a run: models:/NAME@champion.")
    return model(out(command))


def sample_from_model(experiment: Experiment, given: Mapping[str, str | None], *, as_json: bool) -> None:
    """`ncsn sample --model`: generate images from a registered model and print where they are."""
    from ncsn.cli.console import ProgressView, quiet_libraries
    from ncsn.runs.progress import StepProgress
    from ncsn.tools import models

    if given.get("score"):
        raise click.UsageError("--score needs a run; `ncsn evaluate` scores the images of a registered model")
    if experiment.place:
        raise click.UsageError("--backend and --address need a run; a registered model is sampled here")
    address = given.get("model")
    if address is None:
        raise click.UsageError("--out goes with --model; the samples of a run are in the run's folder")
    if given.get("checkpoint"):
        raise click.UsageError("give --checkpoint or --model, not both")
    registry = experiment.registry
    with quiet_libraries(None) as console, ProgressView(console) as view:
        view.start("sample")
        result = models.sample_model(
            address,
            registry=registry,
            root=experiment.store_root,
            out=given.get("out"),
            overrides=experiment.overrides,
            progress=lambda done, total: view.update("sample", StepProgress(done, total, "images")),
        )
        view.finish("sample", f"done in {result.seconds:,.1f} s")
    text = f"""sample: {result.num_images:,} images of {result.model}, {result.nfe:,} network evaluations per image
uri: {result.uri}
grid: {result.grid}"""
    click.echo(json.dumps(asdict(result), indent=1) if as_json else text)
