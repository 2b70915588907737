"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ncsn.cli.catalogue import OWN
from ncsn.errors import UserError

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
