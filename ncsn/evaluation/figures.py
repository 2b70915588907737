"""The figures of merit of one set of images against a reference, named with their extractor and sample count."""

from __future__ import annotations

import numpy as np

from ncsn.evaluation.extractors import Extracted
from ncsn.evaluation.frechet_distance import FrechetStatistics, frechet_distance
from ncsn.evaluation.inception_score import inception_score
from ncsn.evaluation.reference import Reference, class_histogram


def figures_of(extracted: Extracted, reference: Reference, *, num_splits: int) -> dict[str, float]:
    """Figures by short name: `score`, `score_std`, `fid`, `class_tv` and `confidence`.

    `score` is the Inception-score formula over contiguous splits, `fid` the Frechet distance to all reference images,
    `class_tv` the total-variation distance in [0, 1] of the histograms of most probable classes, and `confidence` the
    mean largest class probability.

    Raises:
        ValueError: for fewer images than splits, or features that are not finite.
    """
    score = inception_score(extracted.log_probabilities, num_splits=num_splits)
    distance = frechet_distance(FrechetStatistics.of(extracted.features), reference.statistics)
    difference = class_histogram(extracted.log_probabilities) - reference.class_histogram
    return {
        "score": score.mean,
        "score_std": score.std,
        "fid": distance,
        "class_tv": float(0.5 * np.abs(difference).sum()),
        "confidence": float(np.exp(extracted.log_probabilities.max(axis=1)).mean()),
    }


def metric_name(figure: str, *, extractor: str, num_images: int, real: bool = False) -> str:
    """`eval/classifier_fid_n512`, or `eval/real_classifier_fid_n512` for real test images."""
    return f"eval/{'real_' if real else ''}{extractor}_{figure}_n{num_images}"
