"""The commands for a store and its registry: ls, show, cleanup. Imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from ncsn.cli.options import FAILURE, ReportingCommand, describe, json_option, registry_options, target_options
from ncsn.errors import UserError, without_users

if TYPE_CHECKING:
    from ncsn.cli.target import TargetOptions
    from ncsn.inspection.listing import Item


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds").removesuffix("+00:00") if seconds else ""


def _plain(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [asdict(item) | {"changed": _date(item.changed)} for item in items]


@click.command("ls", cls=ReportingCommand, short_help="List the newest runs, datasets or models.")
@click.argument("kind", type=click.Choice(("runs", "datasets", "models")), default="runs")
@registry_options
@json_option
def ls_command(*, kind: str, options: TargetOptions, as_json: bool) -> None:
    """List the newest 50 runs, datasets or registered models: state, size, date (UTC) and figures.

    A run is LOST if it has not ended and nothing in its folder has changed for an hour.
    """
    from rich.filesize import decimal
    from rich.table import Column, Table
    from rich.text import Text

    from ncsn.cli.console import console_on
    from ncsn.inspection.listing import list_datasets, list_models, list_runs

    root = options.store_root
    if kind == "models":
        from ncsn.tracking.client import mlflow_errors

        uri = options.registry
        with mlflow_errors(uri):
            items = list_models(uri)
        count = len(items)
    else:
        items, count = list_runs(root) if kind == "runs" else list_datasets(root)
    if as_json:
        click.echo(json.dumps({kind: _plain(items), "count": count}, indent=1))
        return
    console = console_on(sys.stdout)
    wide = ("size", "date") if console.width >= 140 else ()  # a line has no room
    table = Table(*(Column(name, no_wrap=True) for name in ("name", "state", *wide)), "figures", box=None)
    for item in items:
        more = (decimal(item.size), _date(item.changed)) if wide else ()
        table.add_row(item.name, item.state, *more, Text(item.figures, no_wrap=True, overflow="ellipsis"))
    if items:
        console.print(table)
    place, rest = uri if kind == "models" else root, f", of which the newest {len(items)}" if count > len(items) else ""
    click.echo(f"{kind} in {place}: {count:,}{rest}")


@click.command("show", cls=ReportingCommand, short_help="Show a run and its steps, a dataset or a model.")
@click.argument("name", metavar="NAME")
@registry_options
@json_option
def show_command(*, name: str, options: TargetOptions, as_json: bool) -> None:
    """Show a run and its steps, a dataset or a model.

    NAME is the name of a run, a dataset's digest or its beginning, a model or one version of it (models:/NAME/3 or
    models:/NAME@champion). With one version, the run of this store that made it is shown too.
    """
    from rich.filesize import decimal
    from rich.text import Text
    from rich.tree import Tree

    from ncsn.cli.console import console_on
    from ncsn.inspection.listing import find_items
    from ncsn.tracking.client import mlflow_errors

    uri = options.registry
    with mlflow_errors(uri):
        items = find_items(options.store_root, uri, name)
    if not items:
        where = f"neither {options.store_root} nor MLflow at {without_users(uri)} has such a run, dataset or model"
        hint = "give the name of a run or a model, a version (models:/NAME/3, models:/NAME@champion) or a digest"
        raise UserError(name, where, hint=hint)
    if as_json:
        click.echo(json.dumps({"id": name, "items": _plain(items)}, indent=1))
        return
    console = console_on(sys.stdout)
    for item in items:
        tree = Tree(Text.assemble((item.kind, "bold"), f" {item.name}"))
        known = {"state": item.state, "size": decimal(item.size), "date": _date(item.changed), "figures": item.figures}
        for fact, value in (known | {**item.facts}).items():
            if value:
                tree.add(Text.assemble((f"{fact}:", "dim"), f" {value}"))
        console.print(tree)


_JOBS_RUN = "With --jobs: only what belongs to this run, and its RayJobs even if it goes on."


@click.command("cleanup", cls=ReportingCommand, short_help="Find, and with --yes delete, what nothing refers to.")
@click.option("--yes", is_flag=True, help="Delete it.")
@click.option("--jobs", is_flag=True, help="Instead, delete abandoned RayJobs and close their runs.")
@click.option(
    "--namespace",
    metavar="NAME",
    help="With --jobs: their namespace; default: that of this pod, or of the current kubeconfig context.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and change nothing; default without --jobs.")
@lambda command: target_options(command, run_help=_JOBS_RUN)
@json_option
@click.pass_context
def cleanup_command(
    ctx: click.Context,
    /,
    *,
    yes: bool,
    jobs: bool,
    namespace: str | None,
    dry_run: bool,
    options: TargetOptions,
    as_json: bool,
) -> None:
    """Print by class what nothing in the store and its MLflow refers to, with its size; --yes deletes it.

    Nothing that a registered version needs, and no run in which something has changed within a day is touched. While
    MLflow cannot be asked, nothing is deleted.

    With --jobs: delete RayJobs whose pipeline run has ended, and close the runs that it left open. The store and MLflow
    then record how the pipeline run ended, or KILLED. The CronJob ncsn-janitor of infra/base/janitor does this every
    minute.
    """
    if jobs:
        if yes or options.config_uri or options.overrides or as_json:
            raise UserError("--jobs", "takes --run, --namespace and --dry-run", hint="leave out the others")
        _end_jobs(ctx, namespace=namespace, run=options.run, dry_run=dry_run)
        return
    for option, value in (("--run", options.run), ("--namespace", namespace)):
        if value is not None:
            raise UserError(option, "goes with --jobs", hint="add it, or leave this out")
    if yes and dry_run:
        raise UserError("--yes", "deletes, which --dry-run forbids", hint="leave one out")
    from rich.filesize import decimal

    from ncsn.inspection.leftovers import CLASSES, delete_leftovers, find_leftovers
    from ncsn.tracking.client import mlflow_errors

    uri, root = options.registry, options.store_root
    with mlflow_errors(uri):
        found, began = find_leftovers(root, uri)
        deleted = list(delete_leftovers(root, uri, found, began)) if yes else found
    total = sum(each.size for each in deleted)
    if as_json:
        items = [asdict(each) for each in deleted]
        click.echo(json.dumps({"deleted": yes, "bytes": total, "items": items}, indent=1))
        return
    for kind, words in CLASSES.items():
        if sizes := [each.size for each in deleted if each.kind == kind]:
            click.echo(f"{len(sizes):>9,}  {decimal(sum(sizes)):>10}  {words}")
    rest = "" if yes or not found else "; --yes deletes it, --json names it"
    click.echo(f"{'deleted' if yes else 'found'} {decimal(total)} in {root} that nothing refers to{rest}")
    if len(deleted) < len(found):
        click.echo(f"a step began meanwhile: {len(found) - len(deleted):,} more stay; run the command again")


def _end_jobs(ctx: click.Context, *, namespace: str | None, run: str | None, dry_run: bool) -> None:
    from ncsn.kubeflow.janitor import clean_up
    from ncsn.remote.kubernetes import KubernetesApi

    api = KubernetesApi(namespace, patience=30.0)
    actions = []
    for action in clean_up(api, run=run, dry_run=dry_run):
        actions.append(action)
        if action.error is None:
            click.echo(f"would {action.verb} {action.what}" if dry_run else f"{action.verb}d {action.what}")
        else:
            why = "; ".join(map(str, describe(action.error)[0]))
            click.echo(f"error: could not {action.verb} {action.what}: {why}", err=True)
    if not actions:
        click.echo(f"nothing to do in {api.namespace}")
    if any(action.error for action in actions):
        ctx.exit(FAILURE)
