"""The `ncsn` command. Imports are inside functions, so that `ncsn --help` does not wait for torch, Ray or MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ncsn.cli.commands import finished, kubeflow, registry, setup
from ncsn.cli.options import (
    Decorated,
    ReportingCommand,
    backend_options,
    existing_run_options,
    experiment_options,
    input_options,
    json_option,
    lease_option,
    score_option,
)
from ncsn.process import reduce_gc
from ncsn.runs.steps import PIPELINE, STEP_INFO

if TYPE_CHECKING:
    from ncsn.cli.target import Experiment


class _InOrder(click.Group):
    """Lists its commands as they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)


_HELP = """Noise conditional score networks: from images to a registered model that generates images.

\b
ncsn init photos/                               write a config for your own images
ncsn plan --config configs/digits.yaml          estimate time, memory and cost
ncsn run --config configs/digits.yaml           run the whole pipeline
ncsn show-config --config configs/digits.yaml   explain every setting
ncsn sample --run NAME --set sampling.seed=1    run one step again
"""


@click.group(cls=_InOrder, help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ncsn", message="%(version)s")
def app() -> None:
    """The `ncsn` command."""


def main() -> None:
    """Entry point of the `ncsn` command."""
    reduce_gc()
    app(prog_name="ncsn")


app.add_command(setup.init_command)


@app.command("run", cls=ReportingCommand, short_help="Run the whole pipeline, or its remaining steps.")
@experiment_options
@json_option
def run_command(*, experiment: Experiment, as_json: bool) -> None:
    """Run the whole pipeline: ingest, train, sample, evaluate, register, report.

    The same command again resumes an interrupted run, and returns at once when all is done.
    """
    from ncsn.cli.execute import run_pipeline

    run_pipeline(experiment.resolve(), as_json=as_json)


def _add_step_command(step: str) -> None:
    info = STEP_INFO[step]

    def command(*, experiment: Experiment, as_json: bool, **given: str | None) -> None:
        from ncsn.cli.execute import run_one

        if given.get("model") or given.get("out"):
            registry.sample_from_model(experiment, given, as_json=as_json)
            return
        target = experiment.resolve(checkpoint=given.get("checkpoint"))
        run_one(step, target, given=given, as_json=as_json)

    decorated: Decorated = json_option(command)
    if info.elsewhere:
        decorated = backend_options(lease_option(decorated))
    if info.on_demand:
        decorated = score_option(decorated)
    decorated = input_options(step)(decorated)
    if step == "sample":
        decorated = registry.model_options(decorated)
    app.command(step, cls=ReportingCommand, help=info.summary)(experiment_options(decorated))


for _step in PIPELINE:
    _add_step_command(_step)


@app.command("show-config", cls=ReportingCommand, short_help="Print every setting with its meaning and range.")
@existing_run_options
@json_option
def show_config_command(*, experiment: Experiment, as_json: bool) -> None:
    """Print the resolved config, each setting with its meaning and range. The output is a valid config file.

    Where noise = auto and the run has its dataset, it begins with the levels that were chosen.
    """
    from ncsn.config import to_json
    from ncsn.tools.draft import documented_yaml

    target = experiment.resolve()
    if not as_json and target.config.noise.kind == "auto":
        from ncsn.tools.plan import chosen_levels

        click.echo("".join(f"# {line}\n" for line in chosen_levels(target.config, target.run)), nl=False)
    click.echo(to_json(target.config) if as_json else documented_yaml(target.config), nl=as_json)


@app.command("ui", cls=ReportingCommand)
@existing_run_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535), help="Port to listen on.")
def ui_command(*, experiment: Experiment, host: str, port: int) -> None:
    """Serve MLflow's pages for the runs in the store. Ctrl-C ends it."""
    from ncsn.cli.execute import serve_ui

    serve_ui(experiment.resolve_any().config, host=host, port=port)


for _command in (
    *(setup.plan_command, finished.select_command),
    *(kubeflow.submit_command, kubeflow.doctor_command, kubeflow.cleanup_command),
    *(registry.promote_command, registry.trace_command),
):
    app.add_command(_command)
