"""Metrics of images by the features of an extractor: here, which one an experiment has."""

from __future__ import annotations

from ncsn.config import Config
from ncsn.config.schema import EvaluationConfig
from ncsn.data.format import Manifest
from ncsn.model.classes import BALANCED
from ncsn.runs import metrics

WITH_SCORE = ("classifier", "inception")  # the extractors whose classes mean something
LEAST_TEST_IMAGES = 3  # for the uncertainty of a Fréchet distance
DEVIATIONS = 1.96  # of the normal distribution, in which 95 % lie


def evaluation_of(config: Config, manifest: Manifest) -> EvaluationConfig:
    """How the samples are evaluated, with the extractor that `auto` stands for."""
    settings = config.evaluation
    if settings.extractor != "auto":
        return settings
    learned = "classifier" if sum(map(bool, manifest.class_counts["train"])) >= 2 else "clusters"
    return settings.model_copy(update={"extractor": settings.pretrained or learned})


def extractor_name(config: Config, manifest: Manifest) -> str:
    """The extractor as metrics name it: with the split of the reference unless that is train."""
    extractor = evaluation_of(config, manifest).extractor
    return metrics.extractor_name(extractor, reference_split=config.evaluation.reference_split)


def classes_in_turn(config: Config) -> int:
    """How many classes the samples show in turn; 1 if they do not."""
    classes = config.data.num_classes
    return classes if classes is not None and config.sampling.label == BALANCED else 1
