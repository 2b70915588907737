"""Metrics of images by the features of an extractor: here, which one an experiment has, and how metrics name it."""

from __future__ import annotations

import math

from ncsn.config import Config
from ncsn.config.schema import EvaluationConfig
from ncsn.data.format import Manifest
from ncsn.model.classes import BALANCED

VERSUS = "_vs_"  # before the split in the names of metrics against another split than train
WITH_SCORE = ("classifier", "inception")  # the extractors whose classes mean something
LEAST_TEST_IMAGES = 3  # for the uncertainty of a Fréchet distance
DEVIATIONS = 1.96  # of the normal distribution, in which 95 % lie


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


def evaluation_of(config: Config, manifest: Manifest) -> EvaluationConfig:
    """How the samples are evaluated, with the extractor that `auto` stands for."""
    settings = config.evaluation
    if settings.extractor != "auto":
        return settings
    learned = "classifier" if sum(map(bool, manifest.class_counts["train"])) >= 2 else "clusters"
    return settings.model_copy(update={"extractor": settings.pretrained or learned})


def extractor_name(config: Config, manifest: Manifest) -> str:
    """The extractor as metrics name it: with the split of the reference unless that is train."""
    extractor, split = evaluation_of(config, manifest).extractor, config.evaluation.reference_split
    return extractor if split == "train" else f"{extractor}{VERSUS}{split}"


def classes_in_turn(config: Config) -> int:
    """How many classes the samples show in turn; 1 if they do not."""
    classes = config.data.num_classes
    return classes if classes is not None and config.sampling.label == BALANCED else 1
