"""Results in a person's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ncsn.cli.records import StepRecord
from ncsn.config import Config
from ncsn.steps.result import RunFolder

_REAL = "eval/real_"
_DIGEST_SHOWN = 12


def describe_result(step: str, result: Mapping[str, Any]) -> str:
    """One or a few lines for the result of a single step."""
    return "\n".join([f"{step}: {result_line(step, result)}", *(f"{key}: {value}" for key, value in _places(result))])


def result_line(step: str, result: Mapping[str, Any]) -> str:
    """The step's result in a few words."""
    match step:
        case "ingest":
            counts = " + ".join(f"{count:,} {split}" for split, count in result["counts"].items())
            return f"{counts} images, digest {result['digest'][:_DIGEST_SHOWN]}"
        case "train":
            loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
            return f"{result['images_seen']:,} images{loss}, {result['images_per_second']:,.0f} images/s"
        case "sample":
            return f"{result['num_images']:,} images, {result['nfe']:,} network evaluations each"
        case "evaluate":
            return f"{result['gate']['name']} = {result['gate']['value']:.4g}"
        case "register":
            aliases = ", ".join(result["aliases"]) or "no alias"
            return f"{result['model']} version {result['version']} ({aliases})"
    raise AssertionError(step)


def print_summary(console: Console, folder: RunFolder, config: Config, records: Mapping[str, StepRecord]) -> None:
    """The whole run: its steps, its scores beside those of real images, where things are, what to do next."""
    console.print(_steps_table(records))
    evaluated = records["evaluate"].result
    console.print(_scores_table(evaluated))
    for note in evaluated.get("notes", ()):
        console.print(f"note: {note}", soft_wrap=True)
    for name, value in _whereabouts(folder, config, records):
        console.print(f"[bold]{name:<8}[/] {value}", soft_wrap=True)


def _steps_table(records: Mapping[str, StepRecord]) -> Table:
    table = Table("step", box=SIMPLE_HEAD)
    table.add_column("seconds", justify="right")
    table.add_column("result")
    for step, record in records.items():
        table.add_row(step, f"{record.seconds:,.1f}", result_line(step, record.result))
    table.add_row("[bold]all", f"[bold]{sum(record.seconds for record in records.values()):,.1f}", "")
    return table


def _scores_table(evaluated: Mapping[str, Any]) -> Table:
    table = Table("score", box=SIMPLE_HEAD)
    for column in ("samples", "real images", "samples / real"):
        table.add_column(column, justify="right")
    real = {_figure(name): value for name, value in evaluated["real_metrics"].items()}
    for name, value in evaluated["metrics"].items():
        beside = real.get(_figure(name))
        if beside is None:
            table.add_row(name, f"{value:.4g}", "", "")
        else:
            ratio = f"{value / beside:.3g}" if beside else ""
            table.add_row(name, f"{value:.4g}", f"{beside:.4g}", ratio)
    return table


def _figure(name: str) -> str:
    """`eval/real_classifier_fid_n540` and `eval/classifier_fid_n512` -> `classifier_fid`."""
    figure = name.removeprefix(_REAL) if name.startswith(_REAL) else name.removeprefix("eval/")
    return figure.rpartition("_n")[0] or figure


def _places(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("uri", "grid", "strip", "checkpoint"):
        if isinstance(result.get(key), str):
            yield key, result[key]


def _whereabouts(folder: RunFolder, config: Config, records: Mapping[str, StepRecord]) -> Iterator[tuple[str, str]]:
    registered = records["register"].result
    sampled = records["sample"].result
    yield "grid", sampled["grid"]
    yield "strip", sampled["strip"]
    yield "model", f"models:/{registered['model']}/{registered['version']}"
    yield "next", f"ncsn ui --run {folder.run}"
    yield "", f"ncsn sample --run {folder.run} --set sampling.seed={config.sampling.seed + 1}"
