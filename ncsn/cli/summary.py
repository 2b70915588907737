"""Results in a person's words."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ncsn import storage
from ncsn.cli.inputs import DEFAULT_ROOT
from ncsn.config import Config
from ncsn.report.words import result_line
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import StepRecord

if TYPE_CHECKING:
    from ncsn.core.noise_schedule import NoiseSuggestion

_REAL = "eval/real_"
_STD = "_std"


def describe_result(step: str, result: Mapping[str, Any]) -> str:
    """One or a few lines for the result of a single step."""
    lines = [f"{step}: {result_line(step, result)}", *(f"{key}: {value}" for key, value in _places(result))]
    if step == "tune":
        lines = [_trials_table(result), *lines, f"next: ncsn run --config {result['config']}"]
    return "\n".join([*lines, *(f"note: {note}" for note in result.get("notes", ()))])


def describe_suggestion(suggestion: NoiseSuggestion) -> str:
    """YAML for a config, under comments that say what it rests on."""
    from ncsn.data.statistics import noise_section

    distances, levels, steps = suggestion.distances, suggestion.num_levels, suggestion.steps_per_level
    section = {
        "noise": dict(noise_section(suggestion)),
        "sampling": {
            "sampler": {
                "kind": "annealed_langevin",
                "steps_per_level": steps,
                "epsilon": float(f"{suggestion.epsilon:.3g}"),
            }
        },
    }
    lines = (
        f"images     {distances.num_images:,}, {'all' if distances.exact else 'a sample'}",
        f"distances  at most {distances.maximum:.4g}, 99.9 % of them up to {distances.quantile_999:.4g}",
        f"levels     {levels} at ratio {suggestion.ratio:.4f}, overlap {suggestion.overlap:.3f}",
        f"epsilon    for T = {steps}: variance {suggestion.variance_ratio:.4f} of the ideal, "
        f"{levels * steps:,} evaluations per image",
    )
    return "\n".join([*(f"# {line}" for line in lines), yaml.safe_dump(section, sort_keys=False).rstrip()])


def describe_import(run: str, checkpoint: str, images_seen: int, num_images: int) -> str:
    """Where the imported checkpoint lies and what can be done with it."""
    going_on = f"ncsn train --run {run}, to train.num_images = {num_images:,}"
    if num_images <= images_seen:
        going_on = f"(nothing: train.num_images = {num_images:,} is reached; import with a larger one to go on)"
    lines = (
        f"checkpoint: {checkpoint}",
        f"seen:       {images_seen:,} images",
        f"train:      {going_on}",
        f"sample:     ncsn sample --run {run}",
    )
    return "\n".join(lines)


def describe_toy(result: Mapping[str, Any]) -> str:
    """The two-dimensional experiments: where the samplers' points are, and where the learned score is right."""
    width = max(map(len, result["weights"]))
    return "\n".join(
        [
            f"share of the points at (5, 5), where the mixture has {result['true_weight']:.2f}:",
            *(f"  {name:<{width}}  {weight:.3f}" for name, weight in result["weights"].items()),
            f"learned score: relative error {result['score_error_near']:.3g} near the modes, "
            f"{result['score_error_elsewhere']:.3g} elsewhere",
            *(f"{key}: {result[key]}" for key in ("figure_2", "figure_3", "uri")),
        ]
    )


def print_summary(
    console: Console, folder: RunFolder, config: Config, records: Mapping[str, StepRecord], *, earlier: Collection[str]
) -> None:
    """The whole run: its steps, its scores beside those of real images, where things are, what to do next.

    Args:
        console: Where to print.
        folder: The run.
        config: The experiment.
        records: Step -> its stored result.
        earlier: Steps whose work an earlier call did.
    """
    console.print(_steps_table(records, earlier))
    console.print(_scores_table(records["evaluate"].result))
    for note in (note for record in records.values() for note in record.result.get("notes", ())):
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"gate: {records['register'].result['reason']}\n", soft_wrap=True)
    for name, value in _whereabouts(folder, config, records):
        console.print(f"[bold]{name:<8}[/] {value}", soft_wrap=True)


def _trials_table(result: Mapping[str, Any]) -> str:
    """The trials of a search, best first, as text."""
    paths = list(result["values"])
    epsilon = ["epsilon"] if "epsilon" in result["sampler"] else []
    table = Table("trial", *(path.rpartition(".")[2] for path in paths), *epsilon, box=SIMPLE_HEAD)
    for column in ("images", "objective", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("status")
    for row in sorted(result["trials"], key=_rank):
        values = [_short(row["values"][path]) for path in paths]
        sampler = [_short(row["sampler"]["epsilon"]) if row["sampler"] else ""] if epsilon else []
        objective = "" if row["objective"] is None else f"{row['objective']:.4g}"
        status = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
        table.add_row(
            str(row["trial"]), *values, *sampler, f"{row['images_seen']:,}", objective, f"{row['seconds']:,.0f}", status
        )
    console = Console(width=max(100, 24 * (len(paths) + 5)), record=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def _rank(row: Mapping[str, Any]) -> tuple[bool, int, float]:
    """Sound trials first, of these the furthest, of these the best."""
    return row["status"] == "failed", -row["images_seen"], row["objective"] if row["images_seen"] else row["trial"]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _steps_table(records: Mapping[str, StepRecord], earlier: Collection[str]) -> Table:
    table = Table("step", box=SIMPLE_HEAD)
    table.add_column("seconds", justify="right")
    table.add_column("result")
    for step, record in records.items():
        when = "  [dim](earlier)[/]" if step in earlier else ""
        table.add_row(step, f"{record.seconds:,.1f}", f"{result_line(step, record.result)}{when}")
    table.add_row("[bold]all", f"[bold]{sum(record.seconds for record in records.values()):,.1f}", "")
    return table


def _scores_table(evaluated: Mapping[str, Any]) -> Table:
    table = Table("score", box=SIMPLE_HEAD)
    for column in ("samples", "real images", "samples / real"):
        table.add_column(column, justify="right")
    metrics = {_figure(name): value for name, value in evaluated["metrics"].items()}
    real = {_figure(name): value for name, value in evaluated["real_metrics"].items()}
    for name, value in evaluated["metrics"].items():
        figure = _figure(name)
        beside = real.get(figure)
        if beside is None or figure.endswith(_STD):
            continue
        ratio = f"{value / beside:.3g}" if value > 0 and beside > 0 else ""
        table.add_row(name, _with_std(metrics, figure), _with_std(real, figure), ratio)
    return table


def _with_std(values: Mapping[str, float], figure: str) -> str:
    std = values.get(figure + _STD)
    return f"{values[figure]:.4g}" + ("" if std is None else f" ± {std:.2g}")


def _figure(name: str) -> str:
    """`eval/real_classifier_fid_n540` and `eval/classifier_fid_n512` -> `classifier_fid`."""
    figure = name.removeprefix(_REAL) if name.startswith(_REAL) else name.removeprefix("eval/")
    return figure.rpartition("_n")[0] or figure


def _places(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("uri", "config", "table", "grid", "strip", "gif", "checkpoint"):
        if isinstance(result.get(key), str):
            yield key, result[key]


def _whereabouts(folder: RunFolder, config: Config, records: Mapping[str, StepRecord]) -> Iterator[tuple[str, str]]:
    from ncsn.tracking.client import shown, tracking_uri

    yield "grid", records["sample"].result["grid"]
    yield "strip", records["sample"].result["strip"]
    yield "report", records["report"].result["uri"]
    yield "model", records["register"].result["uri"]
    yield "mlflow", f"run {folder.run} in experiment {config.tracking.experiment} at {shown(tracking_uri(config))}"
    found = folder.root == storage.absolute(DEFAULT_ROOT)
    this_run = f"--run {folder.run}" if found else f"--run {folder.run} --config {folder.config}"
    yield "next", f"ncsn ui {this_run}"
    yield "", f"ncsn sample {this_run} --set sampling.seed={config.sampling.seed + 1}"
