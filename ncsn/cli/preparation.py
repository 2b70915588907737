"""The commands that prepare a training. Their imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import dataclasses
import json

import click

from ncsn.cli.failures import ReportingCommand
from ncsn.cli.options import experiment_options, json_option
from ncsn.errors import UserError


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
    from ncsn.cli.inputs import resolve
    from ncsn.cli.summary import describe_suggestion
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
    from ncsn.cli.inputs import resolve
    from ncsn.cli.summary import describe_import
    from ncsn.cli.upstream import find_inputs
    from ncsn.runs.folder import run_folder
    from ncsn.tools import preparation

    target = resolve(config_uri, overrides=overrides, run=run_name)
    inputs = find_inputs(run_folder(target.config, target.run), "train", {"dataset": dataset})
    result = preparation.import_checkpoint(target.config, run=target.run, file=file, **inputs)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=1))
    else:
        click.echo(describe_import(target.run, result.checkpoint, result.images_seen, target.config.train.num_images))
