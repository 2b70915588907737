"""Metrics: their names in records and in MLflow, what each says, and their values in words.

A metric that is not in `MEANINGS` has no name, so that none is measured that no page shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

INTERVAL = ("_low", "_high")  # after the name of a metric: the ends of its 95 % interval
_VERSUS = "_vs_"  # between an extractor and the split that it compares with, unless that is train


class Meaning(NamedTuple):
    """What a metric says."""

    label: str
    text: str
    better: Literal["higher", "lower", ""]


# In the order in which they are shown.
MEANINGS: Mapping[str, Meaning] = {
    "excess": Meaning(
        "Distance beyond real images",
        "By how much the kernel distance of these images exceeds that of real images the model has not seen: 0 % would "
        "be as good as real, 100 % is noise with the mean and covariance of the training pixels.",
        "lower",
    ),
    "score": Meaning(
        "Score",
        "The Inception Score formula: high when each image clearly shows one class and all classes occur. Ranges from "
        "1 to the number of classes.",
        "higher",
    ),
    "fid": Meaning(
        "Fréchet distance",
        "Distance between the features of these images and those of {reference}. Fewer images give a larger value.",
        "lower",
    ),
    "class_agreement": Meaning("Class agreement", "Share of the images classified as the requested class.", "higher"),
    "precision": Meaning(
        "Precision", "Share of these images whose features fall among those of the real images.", "higher"
    ),
    "recall": Meaning("Recall", "Share of the real images whose features fall among those of these images.", "higher"),
    "copies": Meaning("Copies", "Share of these images nearer to a training image than unseen images are.", "lower"),
    "closeness": Meaning("Closeness", "Share nearer to a training image than to any test image.", "lower"),
    "kid": Meaning(
        "Kernel distance",
        "Distance to {reference} that does not depend on the number of images. It averages zero for real images.",
        "lower",
    ),
    "density": Meaning(
        "Density",
        "How densely real images surround these in feature space; about 1 for real images. Like precision, but less "
        "sensitive to outliers.",
        "higher",
    ),
    "coverage": Meaning(
        "Coverage",
        "Share of the real images that have one of these images nearby in feature space. Like recall, but less "
        "sensitive to outliers.",
        "higher",
    ),
    "class_kid": Meaning("Kernel distance by class", "Its mean over the classes, each to its own images.", "lower"),
    "class_tv": Meaning(
        "Class imbalance",
        "Total variation distance between the class frequencies here and in {reference}, from 0 to 1.",
        "lower",
    ),
    "confidence": Meaning("Confidence", "Mean probability of the most likely class of an image.", "higher"),
}
_NAME = re.compile(
    rf"eval/(?P<real>real_)?(?P<extractor>[a-z0-9]+)(?:{_VERSUS}(?P<split>train|test))?_(?P<metric>[a-z_]+)_n(?P<count>\d+)"
)
EXTRACTOR_ACCURACY = "eval/classifier_test_accuracy"  # of the classifier that measures, not of the samples


class Reading(NamedTuple):
    """A metric, read from its name: `eval/classifier_fid_n512` is the fid of 512 images by the classifier."""

    name: str
    extractor: str
    num_images: int
    value: float
    split: str = "train"  # of the images that it compares with


def extractor_name(extractor: str, *, reference_split: str) -> str:
    """An extractor as metrics name it, with the split of its reference unless that is train."""
    return extractor if reference_split == "train" else f"{extractor}{_VERSUS}{reference_split}"


def metric_name(metric: str, *, extractor: str, num_images: int, real: bool = False) -> str:
    """`eval/classifier_fid_n512`, or `eval/real_classifier_fid_n512` for real test images.

    Raises:
        ValueError: The metric has no line in `MEANINGS`.
    """
    name = f"eval/{'real_' if real else ''}{extractor}_{metric}_n{num_images}"
    _parsed(name)
    return name


def read_metrics(metrics: Mapping[str, float]) -> dict[str, Reading]:
    """The metrics of an evaluation by `<metric>`, from their full names.

    Of a metric of several numbers of images this is that of the fewest, which is known of real images too.

    Raises:
        ValueError: A name is none of `metric_name`.
    """
    readings = dict[str, Reading]()
    for name, value in metrics.items():
        if name == EXTRACTOR_ACCURACY:
            continue
        found = _parsed(name)
        metric, count = found["metric"], int(found["count"])
        if metric not in readings or count < readings[metric].num_images:
            readings[metric] = Reading(name, found["extractor"], count, float(value), found["split"] or "train")
    return readings


def _parsed(name: str) -> re.Match[str]:
    found = _NAME.fullmatch(name)
    if found is None or re.sub(rf"(_std|{'|'.join(INTERVAL)})$", "", found["metric"]) not in MEANINGS:
        raise ValueError(f"{name!r} is no name of a metric in ncsn.runs.metrics.MEANINGS")
    return found


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`7.6 (4.4 to 13)`."""
        return with_interval(self.value, self.low, self.high)

    @property
    def signed(self) -> str:
        """`+2.1 (0.9 to 3.3)`, of a difference."""
        return f"{'+' if self.value > 0 else ''}{self}"


def with_interval(value: float, low: float, high: float) -> str:
    """`7.6 (4.4 to 13)`: with two digits, and one more for each power of ten by which the interval is narrower."""
    largest = max(abs(value), abs(low), abs(high))
    if not math.isfinite(value + low + high) or largest == 0:
        return f"{value:g} ({low:g} to {high:g})"
    digits = 2 + max(0, math.floor(math.log10(largest / max(high - low, 1e-9 * largest))))
    least = largest / 100  # so that a bound near zero has no more decimals than tell something
    texts = []
    for number in (value, low, high):
        decimals = max(0, digits - 1 - math.floor(math.log10(max(abs(number), least))))
        texts.append(f"{round(number, decimals) + 0.0:,.{decimals}f}")
    return f"{texts[0]} ({texts[1]} to {texts[2]})"


def shown_reading(metric: str, readings: Mapping[str, Reading]) -> str:
    """`14.2 (11.9 to 17.0)`; empty without a value."""
    if metric not in readings:
        return ""
    value, *ends = (readings[name].value for end in ("", *INTERVAL) if (name := metric + end) in readings)
    if metric == "excess":
        return with_interval(*(100 * each for each in (value, *ends))) + " %"
    return with_interval(value, *ends) if ends else f"{value:.4g}"


GRADES = {
    "close": "close to real",
    "short": "not yet close to real: train longer",
    "far": "far from real: train longer or add images",
    "unsure": "unsure: too few test images to tell how close to real",
    "copied": "copies of training images: add images or train shorter",
}
# What classifiers say of generated images, by its grade.
UTILITY = {
    "helps": "help",
    "harms": "harm",
    "same": "make no difference that could be seen",
    "copies": "were not judged: every one that was made copies a training image",
}
