"""Metrics, results and costs in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ncsn.report.page import Fact, ScoreRow

REAL = "eval/real_"
GENERATED = "eval/"


@dataclass(frozen=True)
class Meaning:
    """What a figure says.

    Attributes:
        label: Its name in words.
        text: One sentence.
        better: The direction of improvement; empty if there is none.
    """

    label: str
    text: str
    better: Literal["higher", "lower", ""]


MEANINGS: Mapping[str, Meaning] = {
    "score": Meaning(
        "Clear and varied",
        "Grows when each image is plainly of one kind and all kinds occur: 1 at worst, the number of kinds at best.",
        "higher",
    ),
    "fid": Meaning(
        "Distance to the training images",
        "Fréchet distance between generated and training images as the extractor sees them; smaller sets read higher.",
        "lower",
    ),
    "kid": Meaning(
        "Distance, whatever the count",
        "Kernel distance to the training images, about zero for real ones; may be slightly negative.",
        "lower",
    ),
    "precision": Meaning("Realistic", "Share of the images that lie among real ones.", "higher"),
    "recall": Meaning("Complete", "Share of the real images that lie among these.", "higher"),
    "density": Meaning(
        "Realistic, outliers aside", "How densely real images surround these; real ones read about 1.", "higher"
    ),
    "coverage": Meaning("Complete, outliers aside", "Share of the real images with one of these nearby.", "higher"),
    "class_tv": Meaning(
        "Imbalance of kinds", "0 if all kinds are as frequent as in training, 1 if none matches.", "lower"
    ),
    "confidence": Meaning("Recognisable", "Mean certainty of the extractor about what an image shows.", "higher"),
    "memorised": Meaning("Copies", "Share of the images that copy a training image, by pixels.", "lower"),
    "nn_distance": Meaning(
        "Distance to the nearest training image",
        "Median over the images, in gray steps of 0 to 255; far below that of real images would mean copying.",
        "",
    ),
}
"""Figures that have words, in the order in which they are shown."""
FIRST = ("score", "fid", "precision", "recall", "memorised")
"""Those to see first."""


@dataclass(frozen=True)
class Reading:
    """A figure of merit, read from its name: `eval/classifier_fid_n512` -> fid of 512 images by the classifier."""

    name: str
    extractor: str
    figure: str
    num_images: int
    value: float


def read_figures(metrics: Mapping[str, float]) -> dict[str, Reading]:
    """Figure -> reading, of metrics named `eval/[real_]<extractor>_<figure>_n<count>`; other metrics are left out."""
    readings = {}
    for name, value in metrics.items():
        stem, _, count = name.removeprefix(REAL).removeprefix(GENERATED).rpartition("_n")
        figure = next((known for known in _known() if stem.endswith(f"_{known}")), None)
        if figure is not None and count.isdigit():
            extractor = stem.removesuffix(f"_{figure}")
            readings[figure] = Reading(name, extractor, figure, int(count), float(value))
    return readings


def score_rows(
    metrics: Mapping[str, float], real_metrics: Mapping[str, float]
) -> tuple[list[ScoreRow], list[ScoreRow]]:
    """A row for each figure that has words, with its deviation and the real images' beside it.

    Returns:
        The rows to see first, and the others.
    """
    generated, real = read_figures(metrics), read_figures(real_metrics)
    rows = {figure: _row(figure, generated, real) for figure in MEANINGS if figure in generated}
    return (
        [row for figure, row in rows.items() if figure in FIRST],
        [row for figure, row in rows.items() if figure not in FIRST],
    )


def _known() -> list[str]:
    """Longest first, because `score_std` ends like `std` would."""
    return sorted((*MEANINGS, *(f"{figure}_std" for figure in MEANINGS)), key=len, reverse=True)


def _row(figure: str, generated: Mapping[str, Reading], real: Mapping[str, Reading]) -> ScoreRow:
    meaning, value = MEANINGS[figure], generated[figure].value
    beside = real[figure].value if figure in real else None
    share, real_share = _bars(value, beside)
    return ScoreRow(
        label=meaning.label,
        name=generated[figure].name,
        meaning=meaning.text,
        better=meaning.better,
        value=_with_deviation(figure, generated),
        real=_with_deviation(figure, real) if beside is not None else "",
        share=share,
        real_share=real_share,
    )


def _with_deviation(figure: str, readings: Mapping[str, Reading]) -> str:
    deviation = readings.get(f"{figure}_std")
    return f"{readings[figure].value:.3g}" + ("" if deviation is None else f" ±\u00a0{deviation.value:.2g}")


def _bars(value: float, real: float | None) -> tuple[float | None, float | None]:
    """Length of the bar and place of the mark in percent, on a scale that ends a little after the larger one."""
    if real is None or not (value >= 0 and real >= 0 and value + real > 0):
        return None, None
    scale = 1.1 * max(value, real)
    return round(100 * value / scale, 1), round(100 * real / scale, 1)


MINUTE, HOUR, DAY = 60, 3600, 86400


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min`, `2.1 h` or `4.0 days`."""
    if seconds < 2 * MINUTE:
        return f"{seconds:,.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:,.1f} min"
    return f"{seconds / HOUR:,.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:,.1f} days"


def cost_line(ledger: Mapping[str, Any]) -> str:
    """The whole run in one line; empty if no step has an account."""
    actual = ledger["actual"]
    return _words(actual["total"], ledger["prices"]["currency"]) if actual["steps"] else ""


def cost_facts(ledger: Mapping[str, Any], *, num_images: int) -> Iterator[Fact]:
    """What the steps took together, what was planned, and what images cost that are made after training.

    Args:
        ledger: As `ncsn.runs.costs.ledger` gives it.
        num_images: Images that the sample step made.
    """
    currency, steps = ledger["prices"]["currency"], ledger["actual"]["steps"]
    if not steps:
        return
    yield Fact("Taken", _words(ledger["actual"]["total"], currency))
    if ledger["plan"] is not None:
        yield Fact("Planned", _words(ledger["plan"]["total"], currency))
    if "sample" in steps and num_images:
        share = 1000 / num_images
        per_thousand = {name: share * value for name, value in steps["sample"].items()}
        yield Fact("Per 1,000 images", _words(per_thousand, currency))


def _words(cost: Mapping[str, float], currency: str) -> str:
    gpu = f" · {cost['gpu_hours']:,.2g} GPU hours" if cost["gpu_hours"] else ""
    return (
        f"{duration(cost['seconds'])} · {cost['cpu_hours']:,.2g} CPU hours{gpu} · {cost['money']:,.2g} {currency} · "
        f"{cost['kwh']:,.2g} kWh"
    )


DIGEST_SHOWN = 12


def result_line(step: str, result: Mapping[str, Any]) -> str:
    """What came of a step.

    Args:
        step: Its name.
        result: Its stored result, as plain values.
    """
    match step:
        case "ingest":
            counts = " + ".join(f"{count:,} {split}" for split, count in result["counts"].items())
            return f"{counts} images, digest {result['digest'][:DIGEST_SHOWN]}"
        case "tune":
            before = "" if result["baseline"] is None else f" (the config as it stands: {result['baseline']:.4g})"
            return f"{result['objective_name']} = {result['objective']:.4g}{before}, {len(result['trials'])} trials"
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
        case "figures":
            return f"{len(result['figures'])} figures: {', '.join(result['figures'])}"
        case "report":
            return f"{result['size'] / 1000:,.0f} kB, {len(result['sections'])} sections"
    raise AssertionError(step)
