"""The commands for registered models. Imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ncsn.cli.options import ReportingCommand, json_option, registry_options
from ncsn.errors import UserError

if TYPE_CHECKING:
    from ncsn.cli.target import TargetOptions


@click.command("promote", cls=ReportingCommand, short_help="Make a registered version the champion.")
@click.argument("model")
@click.option("--version", metavar="N", help="Version to promote; default: the challenger.")
@click.option("--force", is_flag=True, help="Promote even if the gate objects.")
@click.option("--rollback", is_flag=True, help="Restore the previous champion instead; again, the one before that.")
@registry_options
@json_option
def promote_command(
    *,
    model: str,
    version: str | None,
    force: bool,
    rollback: bool,
    options: TargetOptions,
    as_json: bool,
) -> None:
    """Make a version of MODEL the champion, if its recorded metric passes the gate against the current champion."""
    from ncsn.tracking.client import client_at, mlflow_errors
    from ncsn.tracking.promotion import promote_version, roll_back

    if rollback and (version is not None or force):
        raise UserError("--rollback", "takes neither --version nor --force", hint="leave them out")
    uri = options.registry
    with mlflow_errors(uri):
        client = client_at(uri)
        done = roll_back(client, model) if rollback else promote_version(client, model, version=version, force=force)
    instead = f" in place of version {done.replaced}" if done.replaced not in ("", done.version) else ""
    text = f"{done.model} version {done.version} is champion{instead}: {done.reason}"
    click.echo(json.dumps(asdict(done), indent=1) if as_json else text)


@click.command("serve", cls=ReportingCommand, short_help="Serve images of a trained network over HTTP.")
@click.argument("named", metavar="ADDRESS")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="Port to listen on.")
@click.option("--replicas", default=1, show_default=True, type=click.IntRange(1), help="Processes that make images.")
@registry_options
def serve_command(*, named: str, port: int, replicas: int, options: TargetOptions) -> None:
    """Serve images of ADDRESS on loopback until Ctrl-C, and follow an alias when it moves.

    ADDRESS is models:/NAME@champion, the name of a run, or the folder or URI of a run, of a checkpoint or of a saved
    model. POST JSON to /images; the page at / does that for you.
    """
    from ncsn.cli.execute import require_free

    host = "127.0.0.1"
    require_free(host, port)
    place = options.named(named)  # before Ray takes seconds
    click.echo(f"starting Ray, then loading {named}", err=True)
    try:
        from ncsn.serving.app import run
    except ImportError as error:
        raise UserError("ray[serve]", f"not installed: {error}", hint="pip install 'ncsn[serve]'") from None
    run(place, port=port, replicas=replicas, ready=lambda: click.echo(f"http://{host}:{port}"))
