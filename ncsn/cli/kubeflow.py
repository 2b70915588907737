"""The commands that deal with a Kubeflow cluster. Their imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import click

from ncsn.cli.options import (
    FAILURE,
    ReportingCommand,
    backend_options,
    describe,
    experiment_options,
    json_option,
    place_overrides,
)
from ncsn.errors import UserError


@click.command("compile", cls=ReportingCommand, short_help="Write the pipelines as the YAML that KFP runs.")
@click.option(
    "--out",
    "folder",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Default: pipelines/compiled of the code.",
)
@click.option("--config", "config_uri", metavar="PATH|URI", help="Size the pods for this experiment.")
@click.option("--set", "overrides", metavar="A.B=VALUE", multiple=True, help="Change one value of it; repeatable.")
def compile_command(*, folder: Path | None, config_uri: str | None, overrides: tuple[str, ...]) -> None:
    """Write the pipelines as the YAML that KFP runs, and print the paths.

    NCSN_IMAGE names the image of the tasks. `ncsn submit` compiles by itself; the files are to upload by hand.
    """
    from ncsn.cli.target import resolve
    from pipelines.compile import COMPILED, compile_all

    known = config_uri is not None or overrides
    config = resolve(config_uri, overrides=overrides).config if known else None
    for path in compile_all(folder or COMPILED, config):
        click.echo(path)


@click.command("submit", cls=ReportingCommand, short_help="Start a pipeline on a Kubeflow cluster.")
@experiment_options
@json_option
@click.option("--host", metavar="URL", help="Address of Kubeflow Pipelines; default: KF_PIPELINES_ENDPOINT.")
@click.option("--pipeline", default="train", show_default=True, help="Which pipeline.")
@click.option("--experiment", metavar="NAME", help="KFP's experiment; default: tracking.experiment of the config.")
@click.option("--namespace", metavar="PROFILE", help="Yours, where Kubeflow serves several users.")
@click.option("--service-account", metavar="NAME", help="Of the pods; default: the cluster's.")
@click.option("--param", "params", metavar="K=V", multiple=True, help="Another parameter of the pipeline; repeatable.")
@click.option("--every", metavar="CRON", help="Run on this schedule, 'minute hour day month weekday' in UTC.")
@click.option("--wait", "waits", is_flag=True, help="Wait for the end; exit with 1 if it is no success.")
@click.option("--no-cache", "anew", is_flag=True, help="Take nothing from KFP's cache.")
def submit_command(
    *,
    config_uri: str | None,
    overrides: tuple[str, ...],
    run_name: str | None,
    as_json: bool,
    host: str | None,
    pipeline: str,
    experiment: str | None,
    namespace: str | None,
    service_account: str | None,
    params: tuple[str, ...],
    every: str | None,
    waits: bool,
    anew: bool,
) -> None:
    """Start a pipeline on a Kubeflow cluster, or a schedule of it, and print the address of its page.

    Credentials come from the environment: NCSN_KFP_TOKEN (a bearer token), NCSN_KFP_COOKIE (of a session in the
    browser), or inside the cluster the token at KF_PIPELINES_SA_TOKEN_PATH.

    `--pipeline sample --param model=models:/NAME@champion` generates images from a registered model; --set storage.root
    says where they go, and other --set change the model's config. `--param evaluated=true` measures them too.
    """
    from ncsn.cli.submission import caching_in_words, prepare, why_it_failed
    from pipelines.connection import connect
    from pipelines.submit import schedule, submit

    if every and waits:
        raise UserError("--wait", "waits for one run, and --every starts many", hint="leave out one of them")
    submission = prepare(
        pipeline,
        config_uri=config_uri,
        overrides=overrides,
        run=run_name,
        params=params,
        scheduled=every is not None,
        experiment=experiment,
        service_account=service_account,
        cache=not anew,
    )
    click.echo(f"cache: {caching_in_words(submission)}", err=True)
    connection = connect(host, namespace=namespace)
    started = schedule(connection, submission, every=every) if every else submit(connection, submission)
    click.echo(json.dumps(dataclasses.asdict(started)) if as_json else started.url)
    if waits:
        from pipelines.wait import wait

        def say(news: str) -> None:
            click.echo(f"{submission.name}: {news}", err=True)

        wait(connection, started.id, say=say, why=lambda: why_it_failed(submission))


@click.command("doctor", cls=ReportingCommand, short_help="Check store, MLflow, Ray, Kubeflow and cluster.")
@experiment_options
@backend_options
@json_option
@click.option("--host", metavar="URL", help="Address of Kubeflow Pipelines; default: KF_PIPELINES_ENDPOINT.")
@click.option("--namespace", metavar="PROFILE", help="Yours, where Kubeflow serves several users.")
@click.pass_context
def doctor_command(
    ctx: click.Context,
    *,
    config_uri: str | None,
    overrides: tuple[str, ...],
    run_name: str | None,
    as_json: bool,
    backend: str | None,
    address: str | None,
    host: str | None,
    namespace: str | None,
) -> None:
    """Check all that the experiment will need, each with the command that mends it; exit with 1 if anything fails."""
    from ncsn.cli.doctor import examine, report
    from ncsn.cli.target import resolve

    place = place_overrides(backend, address)
    config = resolve(config_uri, overrides=(*overrides, *place), run=run_name).config
    if not report(examine(config, host=host, namespace=namespace), as_json=as_json):
        ctx.exit(FAILURE)


_PATIENCE_SECONDS = 30.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")


def reap_orphans(*, namespace: str | None, run: str | None, older_than: str, at_work: bool, dry_run: bool) -> bool:
    """Do what is left to do, or list it, one line each; whether all of it could be done."""
    from ncsn.remote.kubernetes import KubernetesApi
    from ncsn.steps.janitor import clean_up

    api, well, deeds = KubernetesApi(namespace, patience=_PATIENCE_SECONDS), True, 0
    for deed in clean_up(api, older_than=_seconds(older_than), run=run, at_work=at_work, dry_run=dry_run):
        deeds += 1
        if deed.error is None:
            click.echo(f"would {deed.verb} {deed.what}" if dry_run else f"{deed.verb}d {deed.what}")
        else:
            well = False
            click.echo(f"error: could not {deed.verb} {deed.what}: {'; '.join(describe(deed.error).lines)}", err=True)
    if not deeds:
        click.echo(f"nothing to do in {api.namespace}")
    return well


def _seconds(text: str) -> float:
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError("--older-than", "not a time", hint="write for example 30m, 2h or 1d", value=text)
    return float(match[1]) * _UNITS[match[2] or "s"]
