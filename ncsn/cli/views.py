"""Results, plans and configs as text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from ncsn import storage
from ncsn.cli.target import DEFAULT_ROOT
from ncsn.config import Config
from ncsn.report.facts import duration, result_line
from ncsn.report.scores import SCORES_HEAD, score_lines
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import StepRecord


def describe_result(step: str, result: Mapping[str, Any]) -> str:
    """The result of one step in a few lines."""
    places = ("uri", "config", "table", "grid", "strip", "checkpoint")
    lines = [f"{step}: {result_line(step, result)}"]
    lines += [f"{key}: {result[key]}" for key in places if isinstance(result.get(key), str)]
    if step == "tune":
        lines = [_trials_table(result), *lines, f"next: ncsn run --config {result['config']}"]
    return "\n".join([*lines, *(f"note: {note}" for note in result.get("notes", ()))])


def print_summary(
    console: Console, folder: RunFolder, config: Config, records: Mapping[str, StepRecord], *, earlier: Collection[str]
) -> None:
    """Steps (an earlier call did those in `earlier`), scores next to real images, outputs, and the next commands."""
    steps = Table("step", Column("seconds", justify="right"), "result", box=SIMPLE_HEAD)
    for step, record in records.items():
        when = "  [dim](earlier)[/]" if step in earlier else ""
        steps.add_row(step, f"{record.seconds:,.1f}", f"{result_line(step, record.result)}{when}")
    steps.add_row("[bold]all", f"[bold]{sum(record.seconds for record in records.values()):,.1f}", "")
    first, *others = SCORES_HEAD
    scores = Table(first, *(Column(name, justify="right") for name in others), box=SIMPLE_HEAD)
    for line in score_lines(records["evaluate"].result):
        scores.add_row(*line)
    console.print(steps, scores)
    for note in (note for record in records.values() for note in record.result.get("notes", ())):
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"gate: {records['register'].result['reason']}\n", soft_wrap=True)
    for name, value in _outputs(folder, config, records):
        console.print(f"[bold]{name:<8}[/] {value}", soft_wrap=True)


def _trials_table(result: Mapping[str, Any]) -> str:
    """The trials of a search, best first, as text."""
    paths = list(result["values"])
    numbers = (Column(name, justify="right") for name in ("images", "objective", "seconds"))
    table = Table("trial", *(path.rpartition(".")[2] for path in paths), "epsilon", *numbers, "status", box=SIMPLE_HEAD)

    def rank(row: Mapping[str, Any]) -> tuple[bool, int, float]:
        """Successful trials first, then the furthest, then the best."""
        return row["status"] == "failed", -row["images_seen"], row["objective"] if row["images_seen"] else row["trial"]

    def short(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    for row in sorted(result["trials"], key=rank):
        values = [*(row["values"][path] for path in paths), (row["sampler"] or {}).get("epsilon")]
        status = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
        done = f"{row['images_seen']:,}", short(row["objective"]), f"{row['seconds']:,.0f}"
        table.add_row(str(row["trial"]), *map(short, values), *done, status)
    console = Console(width=max(100, 24 * (len(paths) + 5)), record=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


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
