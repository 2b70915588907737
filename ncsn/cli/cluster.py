"""The commands for a cluster: submit, doctor. Imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ncsn.cli.options import (
    FAILURE,
    ReportingCommand,
    backend_options,
    code_option,
    existing_run_options,
    json_option,
    target_options,
)
from ncsn.errors import UserError

if TYPE_CHECKING:
    from ncsn.cli.target import TargetOptions

_PIPELINES = click.Choice(["train", "sample", "synthesize"])


@click.command("submit", cls=ReportingCommand, short_help="Start a pipeline on a Kubeflow cluster.")
@target_options
@code_option
@json_option
@click.option("--host", metavar="URL", help="Address of Kubeflow Pipelines; default: KF_PIPELINES_ENDPOINT.")
@click.option("--pipeline", default="train", show_default=True, type=_PIPELINES, help="Pipeline to start.")
@click.option("--namespace", metavar="PROFILE", help="Your profile, where Kubeflow serves several users.")
@click.option("--service-account", metavar="NAME", help="Service account of the pods; default: the cluster's.")
@click.option("--param", "params", metavar="K=V", multiple=True, help="Another parameter of the pipeline; repeatable.")
@click.option("--every", metavar="CRON", help="Run on this schedule, 'minute hour day month weekday' in UTC.")
@click.option("--wait", "waits", is_flag=True, help="Wait for the end; exit with 1 unless the run succeeds.")
@click.option("--no-cache", is_flag=True, help="Do not use KFP's cache.")
@click.option(
    "--compile-only",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the pipeline as the YAML that KFP's Upload pipeline takes, and start nothing.",
)
def submit_command(
    *,
    options: TargetOptions,
    as_json: bool,
    host: str | None,
    namespace: str | None,
    every: str | None,
    waits: bool,
    no_cache: bool,
    compile_only: Path | None,
    **others: Any,
) -> None:
    """Start a pipeline on a Kubeflow cluster, or a schedule of it, and print the address of its page.

    Credentials come from the environment: NCSN_KFP_TOKEN (a bearer token), NCSN_KFP_COOKIE (of a browser
    session) or, inside a cluster, the token at KF_PIPELINES_SA_TOKEN_PATH.

    `--pipeline sample --param model=models:/NAME@champion` generates images from a registered model; --set storage.root
    names their store, and any other --set changes the model's config. `--param evaluated=true` measures them too.
    """
    from ncsn import storage
    from ncsn.cli.submission import prepare, why_it_failed
    from pipelines.submit import connect, package, submit

    if every and waits:
        raise UserError("--wait", "waits for one run, but --every starts many", hint="leave out one of them")
    if compile_only is not None:
        storage.require_output("--compile-only", str(compile_only), new=False)
    submission = prepare(options, scheduled=every is not None, cache=not no_cache, **others)
    if compile_only is not None:
        with package(submission) as (file, _):
            compile_only.write_bytes(file.read_bytes())
        click.echo(compile_only)
        return
    connection = connect(host, namespace=namespace)
    started = submit(connection, submission, every=every)
    click.echo(json.dumps(asdict(started)) if as_json else started.url)
    if waits:
        from pipelines.wait import wait

        def say(news: str) -> None:
            click.echo(f"{submission.name}: {news}", err=True)

        try:
            wait(connection, started.id, say=say, why=lambda: why_it_failed(submission))
        except KeyboardInterrupt:
            say(f"no longer watched; the run goes on, and Terminate on its page ends it: {started.url}")
            raise


@click.command("doctor", cls=ReportingCommand, short_help="Check store, MLflow, Ray, images, Kubeflow and cluster.")
@existing_run_options
@backend_options
@json_option
@click.option("--host", metavar="URL", help="Address of Kubeflow Pipelines; default: KF_PIPELINES_ENDPOINT.")
@click.option("--namespace", metavar="PROFILE", help="Your profile, where Kubeflow serves several users.")
@click.pass_context
def doctor_command(
    ctx: click.Context, *, options: TargetOptions, as_json: bool, host: str | None, namespace: str | None
) -> None:
    """Check what the experiment needs, and print a fix for each failure; exit with 1 if a check fails."""
    from ncsn.cli.doctor import examine, report

    if not report(examine(options.resolve().config, host=host, namespace=namespace), as_json=as_json):
        ctx.exit(FAILURE)
