"""Results, plans and configs as text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ncsn import storage
from ncsn.cli.target import DEFAULT_ROOT
from ncsn.config import Config
from ncsn.report.facts import duration, result_line
from ncsn.report.words import ERRORS, read_metrics
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import StepRecord

if TYPE_CHECKING:
    pass


_REAL = "eval/real_"


def describe_result(step: str, result: Mapping[str, Any]) -> str:
    """The result of one step in a few lines."""
    lines = [f"{step}: {result_line(step, result)}", *(f"{key}: {value}" for key, value in _places(result))]
    if step == "tune":
        lines = [_trials_table(result), *lines, f"next: ncsn run --config {result['config']}"]
    return "\n".join([*lines, *(f"note: {note}" for note in result.get("notes", ()))])


def print_summary(
    console: Console, folder: RunFolder, config: Config, records: Mapping[str, StepRecord], *, earlier: Collection[str]
) -> None:
    """Steps (an earlier call did those in `earlier`), scores next to real images, outputs, and the next commands."""
    console.print(_steps_table(records, earlier))
    console.print(_scores_table(records["evaluate"].result))
    for note in (note for record in records.values() for note in record.result.get("notes", ())):
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"gate: {records['register'].result['reason']}\n", soft_wrap=True)
    for name, value in _outputs(folder, config, records):
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
    """Successful trials first, then the furthest, then the best."""
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
    metrics = {_metric(name): value for name, value in evaluated["metrics"].items()}
    real = {_metric(name): value for name, value in evaluated["real_metrics"].items()}
    for name, value in evaluated["metrics"].items():
        metric = _metric(name)
        of_real = real.get(metric)
        if metric.endswith(ERRORS) or not read_metrics({name: value}):
            continue
        ratio = f"{value / of_real:.3g}" if of_real is not None and value > 0 and of_real > 0 else ""
        table.add_row(name, _with_std(metrics, metric), "" if of_real is None else _with_std(real, metric), ratio)
    return table


def _with_std(values: Mapping[str, float], metric: str) -> str:
    std = next((values[metric + error] for error in ERRORS if metric + error in values), None)
    return f"{values[metric]:.4g}" + ("" if std is None else f" ± {std:.2g}")


def _metric(name: str) -> str:
    """`eval/real_classifier_fid_n540` and `eval/classifier_fid_n512` -> `classifier_fid`."""
    metric = name.removeprefix(_REAL) if name.startswith(_REAL) else name.removeprefix("eval/")
    return metric.rpartition("_n")[0] or metric


def _places(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("uri", "config", "table", "grid", "strip", "checkpoint"):
        if isinstance(result.get(key), str):
            yield key, result[key]


def _outputs(folder: RunFolder, config: Config, records: Mapping[str, StepRecord]) -> Iterator[tuple[str, str]]:
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


def print_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """Time and cost of training and sampling, and what they are computed from."""
    table = Table("step", box=SIMPLE_HEAD)
    names = [name for name in ("cpu_hours", "gpu_hours", "money") if name in plan["steps"]["train"]]
    for column in ("time", *(name.replace("cpu", "CPU").replace("gpu", "GPU").replace("_", " ") for name in names)):
        table.add_column(column, justify="right")
    for step, cost in plan["steps"].items():
        table.add_row(step, duration(cost["seconds"]), *(f"{cost[name]:,.3g}" for name in names))
    console.print(table)
    flop = plan["gflop"]
    lines = [
        f"network  {plan['parameters']:,} parameters; {flop['train']:,.3g} GFLOP to train an image, "
        f"{flop['sample']:,.3g} to evaluate one",
        f"rate     {plan['images_per_second']:,.0f} training images/s, {plan['basis']}; NFE {plan['nfe']}",
        f"memory   {plan['worker_gb']:.2f} GB of a worker for weights, optimizer and feature maps",
        *(f"note     {note}" for note in plan["notes"]),
        "Reading, evaluation and the start of each step are not counted: a minute or two for a small dataset.",
    ]
    console.print("\n".join(lines), soft_wrap=True)
