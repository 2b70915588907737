"""The commands for registered models and MLflow's pages. Imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ncsn.cli.options import ReportingCommand, existing_run_options, json_option, registry_options
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
    *, model: str, version: str | None, force: bool, rollback: bool, options: TargetOptions, as_json: bool
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
    host = "127.0.0.1"
    require_free(host, port)
    place = options.named(named)  # before Ray takes seconds
    click.echo(f"starting Ray, then loading {named}", err=True)
    try:
        from ncsn.serving.app import run
    except ImportError as error:
        raise UserError("ray[serve]", f"not installed: {error}", hint="pip install 'ncsn[serve]'") from None
    run(place, port=port, replicas=replicas, ready=lambda: click.echo(f"http://{host}:{port}"))


@click.command("ui", cls=ReportingCommand)
@existing_run_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535), help="Port to listen on.")
def ui_command(*, options: TargetOptions, host: str, port: int) -> None:
    """Serve MLflow's pages until Ctrl-C, and open the list of runs, or with --run the page of the run."""
    from ncsn.tracking.client import server_command
    from ncsn.tracking.mlflow_runs import front_page

    uri = options.registry
    command, variables = server_command(uri, host=host, port=port)
    require_free(host, port)  # MLflow's server exits with 0 if it cannot listen
    address = f"http://{host}:{port}{front_page(uri, run=options.run)}"
    quiet = os.environ | variables | {"PYTHONWARNINGS": "ignore"}  # MLflow warns of its own dependencies
    with subprocess.Popen(command, start_new_session=True, env=quiet) as server, suppress(KeyboardInterrupt):  # noqa: S603
        try:
            while server.poll() is None:
                with suppress(ConnectionError), socket.create_connection((host, port)):
                    click.echo(address, err=True)
                    if sys.stderr.isatty() and ("DISPLAY" in os.environ or sys.platform == "darwin"):
                        click.launch(address)
                    break
                time.sleep(0.5)
            sys.exit(server.wait())
        finally:
            server.terminate()  # Ctrl-C does not reach it: it has its own session


def require_free(host: str, port: int) -> None:
    """Raise `UserError` if this process cannot listen there."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0].lower()
        key, value = ("--port", port) if error.errno in (errno.EADDRINUSE, errno.EACCES) else ("--host", host)
        raise UserError(key, reason, hint=f"choose another {key}", value=value) from None
