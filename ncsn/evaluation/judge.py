"""The extractor that a config asks for, and one figure of merit of images under it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ncsn.config import Config, from_json, to_json
from ncsn.core.allocator import keep_freed_memory
from ncsn.data.cache import open_cache
from ncsn.data.manifest import load_manifest
from ncsn.evaluation.classifier import ClassifierRecipe
from ncsn.evaluation.classifier_store import obtain_classifier
from ncsn.evaluation.extractors import Extractor
from ncsn.evaluation.inception import InceptionExtractor
from ncsn.evaluation.reference import Reference, obtain_reference

REFERENCE_SPLIT = "train"
SEED = 0
"""Of the classifier and of what is drawn: the same for all experiments on a data set, so that they compare."""


@dataclass(frozen=True)
class Judge:
    """The extractor of an experiment and the training images through it.

    Attributes:
        extractor: What looks at images.
        reference: What it sees in the training images.
        facts: What is known of the extractor's quality, as metrics.
    """

    extractor: Extractor
    reference: Reference
    facts: dict[str, float]


@lru_cache(maxsize=1)
def _cached(config: str, dataset: str) -> Judge:
    return obtain_judge(from_json(config), dataset)


def judge_of(config: Config, dataset: str) -> Judge:
    """The same as `obtain_judge`, kept in this process for the next call."""
    return _cached(to_json(config), dataset)


def obtain_judge(
    config: Config,
    dataset: str,
    *,
    on_training: Callable[[int, int], None] | None = None,
    on_reference: Callable[[int, int], None] | None = None,
) -> Judge:
    """Open the extractor and the reference in the store, or make them now and store them.

    Args:
        config: The experiment; its evaluation section decides.
        dataset: URI of the ingested data set.
        on_training: Called with (images done, images in all) while a classifier is trained.
        on_reference: The same while the training images are looked at.

    Raises:
        ValueError: if the data set has too few test images or no labels, or weights are not those that were asked for.
    """
    keep_freed_memory()
    manifest, train = load_manifest(dataset), open_cache(dataset, "train")
    extractor, facts = _obtain_extractor(config, dataset, on_progress=on_training)
    reference = obtain_reference(
        dataset,
        extractor,
        images=train.images,
        dataset_digest=manifest.digest,
        split=REFERENCE_SPLIT,
        batch_size=config.evaluation.batch_size,
        on_progress=on_reference,
    )
    return Judge(extractor=extractor, reference=reference, facts=facts)


def _obtain_extractor(
    config: Config, dataset: str, *, on_progress: Callable[[int, int], None] | None
) -> tuple[Extractor, dict[str, float]]:
    """The configured extractor, and what is known of its quality as metrics."""
    settings = config.evaluation
    manifest, train, test = load_manifest(dataset), open_cache(dataset, "train"), open_cache(dataset, "test")
    device = "cuda" if config.compute.use_gpu and torch.cuda.is_available() else "cpu"
    if len(test) < settings.num_splits:
        raise ValueError(
            f"the test split has {len(test)} images, fewer than evaluation.num_splits = {settings.num_splits}; "
            "lower evaluation.num_splits or raise data.test_fraction"
        )
    if settings.extractor == "inception":
        assert settings.weights is not None, "the schema asks for weights"
        return InceptionExtractor(settings.weights, sha256=settings.weights_sha256, device=device), {}
    recipe = ClassifierRecipe(
        image_size=manifest.image_size,
        channels=manifest.channels,
        num_classes=len(manifest.class_names),
        epochs=settings.classifier_epochs,
        seed=SEED,
    )
    stored = obtain_classifier(dataset, recipe, train=train, test=test, device=device, on_progress=on_progress)
    known = not math.isnan(stored.test_accuracy)
    return stored.extractor, {"eval/classifier_test_accuracy": stored.test_accuracy} if known else {}
