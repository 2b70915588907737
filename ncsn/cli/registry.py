"""`ncsn promote`, `rollback` and `export`, and `ncsn sample --model`: what works on the registry and not on a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from ncsn.cli.failures import ReportingCommand
from ncsn.cli.options import Decorated, experiment_options, json_option
from ncsn.errors import UserError

if TYPE_CHECKING:
    from ncsn.tracking.promotion import AliasChange


class Change(TypedDict):
    """What the commands that move an alias are asked besides the model."""

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
    from ncsn.cli.inputs import registry_uri
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
    from ncsn.cli.inputs import registry_uri, resolve
    from ncsn.runs.folder import run_folder
    from ncsn.runs.records import read_record
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
        trained = read_record(run_folder(target.config, target.run), "train")
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
    from ncsn.cli.inputs import registry_uri, store_root
    from ncsn.cli.output import quiet_libraries
    from ncsn.cli.progress_view import ProgressView
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
