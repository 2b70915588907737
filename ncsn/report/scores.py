"""Figures of merit in words: what each one says, and the samples' beside that of real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ncsn.report.page import ScoreRow

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
