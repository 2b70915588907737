"""The commands. Their imports are inside, so that `ncsn --help` does not wait for torch, Ray or MLflow."""

from __future__ import annotations

from collections.abc import Mapping

import click

from ncsn.cli.commands import (
    export_command,
    figures_command,
    import_checkpoint_command,
    model_options,
    plan_command,
    promote_command,
    rollback_command,
    sample_from_model,
    suggest_noise_command,
    toy_command,
    trace_command,
)
from ncsn.cli.kubeflow import compile_command, doctor_command, reap_orphans, submit_command
from ncsn.cli.options import (
    CATALOGUE,
    FAILURE,
    Decorated,
    ReportingCommand,
    backend_options,
    experiment_options,
    inject_option,
    json_option,
    place_overrides,
    score_option,
)
from ncsn.process import reduce_gc


class _InOrder(click.Group):
    """Lists its commands as they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)


_HELP = """Noise conditional score networks: from images to a registered model that generates images.

\b
ncsn plan --config configs/digits.yaml          what the pipeline will take
ncsn run --config configs/digits.yaml           the whole pipeline
ncsn show-config --config configs/digits.yaml   what the config means
ncsn sample --run NAME --set sampling.seed=1    one step of a run again
"""


@click.group(cls=_InOrder, help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ncsn", message="%(version)s")
def app() -> None:
    """The `ncsn` command."""


def main() -> None:
    """Entry point of the `ncsn` command."""
    reduce_gc()
    app(prog_name="ncsn")


@app.command("run", cls=ReportingCommand, short_help="Run the whole pipeline, or its remaining steps.")
@experiment_options
@json_option
def run_command(*, config_uri: str | None, overrides: tuple[str, ...], run_name: str | None, as_json: bool) -> None:
    """Run the whole pipeline: ingest, train, sample, evaluate, register, report.

    The same command again resumes where it stopped, and returns at once when all is done.
    """
    from ncsn.cli.execute import run_pipeline
    from ncsn.cli.target import resolve

    run_pipeline(resolve(config_uri, overrides=overrides, run=run_name), as_json=as_json)


_NOT_WITH_A_MODEL = {
    "inject": "--inject rehearses on a run, not on a registered model",
    "score": "--score goes with a run; `ncsn evaluate` scores the images of a registered model",
    "backend": "--backend and --address go with a run; a registered model is sampled here",
}


def _require_nothing_of_a_run(given: Mapping[str, object]) -> None:
    for name, message in _NOT_WITH_A_MODEL.items():
        if given[name]:
            raise click.UsageError(message)


def _add_step_command(step: str) -> None:
    def command(
        *,
        config_uri: str | None,
        overrides: tuple[str, ...],
        run_name: str | None,
        as_json: bool,
        inject: tuple[str, ...] = (),
        **given: str | None,
    ) -> None:
        from ncsn.cli.execute import run_step
        from ncsn.cli.target import resolve

        place = place_overrides(given.pop("backend", None), given.pop("address", None))
        if given.get("model") or given.get("out"):
            _require_nothing_of_a_run({"inject": inject, "score": given.get("score"), "backend": place})
            sample_from_model(given, config_uri=config_uri, overrides=overrides, run_name=run_name, as_json=as_json)
            return
        target = resolve(config_uri, overrides=(*overrides, *place), run=run_name, checkpoint=given.get("checkpoint"))
        run_step(step, target, given=given, as_json=as_json, settings={"inject": inject} if inject else None)

    decorated: Decorated = json_option(command)
    if CATALOGUE[step].leased:
        decorated = click.option(
            "--lease", metavar="URI", help="Heartbeat of a launcher elsewhere: when it stops, save and end."
        )(decorated)
        decorated = backend_options(decorated)
    if CATALOGUE[step].rehearsed:
        decorated = inject_option(decorated)
    if CATALOGUE[step].on_demand:
        decorated = score_option(decorated)
    for name, source in reversed(list(CATALOGUE[step].inputs.items())):
        decorated = click.option(f"--{name}", metavar="URI", help=f"The {source.what}; default: the run's own.")(
            decorated
        )
    if step == "sample":
        decorated = model_options(decorated)
    app.command(step, cls=ReportingCommand, help=CATALOGUE[step].summary)(experiment_options(decorated))


for _step in CATALOGUE:
    _add_step_command(_step)


@app.command("reap", cls=ReportingCommand, short_help="Delete abandoned RayJobs and close their runs.")
@click.option("--namespace", metavar="NAME", help="Default: that of this pod, or of the current kubeconfig context.")
@click.option("--run", "run_name", metavar="NAME", help="Only what belongs to this run.")
@click.option(
    "--older-than",
    default="2h",
    show_default=True,
    metavar="TIME",
    help="Silence of the launcher, such as 30m or 2h; 0 takes RayJobs that somebody waits for too.",
)
@click.option("--at-work", is_flag=True, help="Leave RayJobs that have failed, to be looked at.")
@click.option("--dry-run", is_flag=True, help="Only list it.")
@click.pass_context
def reap_command(
    ctx: click.Context, *, namespace: str | None, run_name: str | None, older_than: str, at_work: bool, dry_run: bool
) -> None:
    """Delete RayJobs whose launcher is silent or whose pipeline run has ended, and close the runs that they leave.

    Such a run is recorded as KILLED in the store and in MLflow, or as what its pipeline run has ended as. The CronJob
    ncsn-janitor of infra/base/janitor does this every minute.
    """
    if not reap_orphans(namespace=namespace, run=run_name, older_than=older_than, at_work=at_work, dry_run=dry_run):
        ctx.exit(FAILURE)


@app.command("show-config", cls=ReportingCommand, short_help="Print the config with each field's meaning.")
@experiment_options
@json_option
def show_config_command(
    *, config_uri: str | None, overrides: tuple[str, ...], run_name: str | None, as_json: bool
) -> None:
    """Print the resolved config, each field with its meaning and range. The output is a valid config file."""
    from ncsn.cli.target import resolve
    from ncsn.cli.views import documented_yaml
    from ncsn.config import to_json

    config = resolve(config_uri, overrides=overrides, run=run_name).config
    click.echo(to_json(config) if as_json else documented_yaml(config), nl=as_json)


@app.command("ui", cls=ReportingCommand)
@experiment_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=5000, show_default=True, help="Port to listen on.")
def ui_command(
    *, config_uri: str | None, overrides: tuple[str, ...], run_name: str | None, host: str, port: int
) -> None:
    """Serve MLflow's pages for the runs in the store. Ctrl-C ends it."""
    from ncsn.cli.execute import serve_ui
    from ncsn.cli.target import any_run, resolve

    if config_uri is None and run_name is None:
        run_name = any_run(overrides)
    serve_ui(resolve(config_uri, overrides=overrides, run=run_name).config, host=host, port=port)


app.add_command(plan_command)
app.add_command(suggest_noise_command)
app.add_command(import_checkpoint_command)
app.add_command(figures_command)
app.add_command(toy_command)
app.add_command(submit_command)
app.add_command(compile_command)
app.add_command(doctor_command)
app.add_command(promote_command)
app.add_command(rollback_command)
app.add_command(trace_command)
app.add_command(export_command)
