"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

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
        help="Rehearse a failure, such as kill-worker@images=5000; repeatable; docs/operations.md lists them.",
    )(command)
