"""`ncsn trace`: the chain from data to model, as a tree."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

import click

from ncsn.cli.failures import ReportingCommand
from ncsn.cli.options import experiment_options, json_option

if TYPE_CHECKING:
    from rich.tree import Tree

    from ncsn.tracking.lineage import Link


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
    from ncsn.cli.inputs import registry_uri
    from ncsn.cli.output import console_on
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
