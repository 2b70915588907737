"""Sets of images and their features, which come batch by batch from other processes where there are any.

No batch is cut in two, so the features do not depend on who makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ncsn.config import Config, to_json
from ncsn.core.keyed_random import COMMON_SEED, keyed_permutation
from ncsn.data.format import Manifest, load_manifest
from ncsn.data.samples import SampleSet
from ncsn.data.training_images import open_cache
from ncsn.evaluation import evaluation_of
from ncsn.evaluation.extractors import Extracted, Extractor, Images, joined
from ncsn.evaluation.extractors.classifier import ClassifierRecipe, classifier_uri, load_classifier, num_clusters
from ncsn.model import build
from ncsn.progress import Progress

T = TypeVar("T")
R = TypeVar("R")


class Runner(Protocol):
    """Calls a function that is found by name, with arguments that pickle, in this process or in others."""

    def __call__(
        self, function: Callable[[T], R | Iterator[R]], items: Sequence[T], *, gpu: bool
    ) -> Iterator[tuple[T, R]]:
        """Each item with `function(item)`, as they are done, or each value that this yields, as it comes.

        What a `functools.partial` binds by name, a node has once. `gpu`: on a GPU if the config uses them.
        """


def here(
    function: Callable[[T], R | Iterator[R]],
    items: Iterable[T],
    *,
    gpu: bool,  # noqa: ARG001
) -> Iterator[tuple[T, R]]:
    """A `Runner` in this process, one call after the other."""
    for item in items:
        found = function(item)
        values: Iterable[Any] = found if isinstance(found, Generator) else [found]
        yield from ((item, value) for value in values)


@dataclass(frozen=True)
class SplitSet:
    """The first `count` images of a split of a dataset, in stored order or, if `drawn`, in a shuffled one."""

    dataset: str
    split: str
    count: int
    drawn: bool = False

    def starts(self, batch_size: int) -> list[int]:
        return list(range(0, self.count, batch_size))

    def read(self, first: int, last: int) -> Images:
        images = open_cache(self.dataset, self.split, as_bytes=True).images
        if not self.drawn:
            return np.asarray(images[first:last])
        return np.asarray(images[keyed_permutation(COMMON_SEED, epoch=0, size=len(images))[first:last]])

    def labels(self) -> NDArray[np.int64]:
        labels = open_cache(self.dataset, self.split, as_bytes=True).labels
        if not self.drawn:
            return np.asarray(labels[: self.count])
        return np.asarray(labels[keyed_permutation(COMMON_SEED, epoch=0, size=len(labels))[: self.count]])


ImageSet = SampleSet | SplitSet


# The first and last image of a batch of a set; config and dataset say what extracts them.
_Batch = tuple[Config, str, ImageSet, int, int]


def extract_set(config: Config, dataset: str, images: ImageSet, *, runner: Runner, progress: Progress) -> Extracted:
    """Features and probabilities of all images of a set, in order; `progress` counts the images."""
    starts = images.starts(config.evaluation.batch_size)
    ends = [*starts[1:], images.count]
    batches: list[_Batch] = [(config, dataset, images, first, last) for first, last in zip(starts, ends, strict=True)]
    found: dict[int, Extracted] = {}
    for (*_, first, last), extracted in runner(_extract, batches, gpu=True):
        found[first] = extracted
        progress.advance(last - first)
    return joined([found.pop(first) for first in starts])


def _extract(batch: _Batch) -> Extracted:
    config, dataset, images, first, last = batch
    return extractor_of(config, dataset).extract(images.read(first, last))


_loaded: dict[tuple[str, str], Extractor] = {}  # the last one, by the config and the dataset


def extractor_of(config: Config, dataset: str) -> Extractor:
    """The configured extractor, loaded in this process and kept for the next call."""
    key = to_json(config), dataset
    if key not in _loaded:
        _loaded.clear()
        settings, device = config.evaluation, device_of(config)
        build.tune_cuda(device)
        if settings.pretrained is None:
            recipe = recipe_of(config, load_manifest(dataset))
            _loaded[key] = load_classifier(classifier_uri(dataset, recipe), device=device)
        else:
            from ncsn.evaluation.extractors.published import Dinov2Extractor, InceptionExtractor

            assert settings.weights is not None, "the schema asks for weights"
            kind = InceptionExtractor if settings.pretrained == "inception" else Dinov2Extractor
            _loaded[key] = kind(settings.weights, device=device)
    return _loaded[key]


def device_of(config: Config) -> str:
    """`cuda` if the config uses GPUs and this process has one, else `cpu`."""
    return "cuda" if config.compute.use_gpu and torch.cuda.is_available() else "cpu"


def recipe_of(config: Config, manifest: Manifest) -> ClassifierRecipe:
    """The classifier of the config for a dataset, by its labels or by clusters."""
    clustered = evaluation_of(config, manifest).extractor == "clusters"
    return ClassifierRecipe(
        shape=manifest.pixels.shape,
        num_classes=num_clusters(manifest.count("train")) if clustered else len(manifest.class_names),
        epochs=config.evaluation.classifier_epochs,
        seed=COMMON_SEED,
        clustered=clustered,
    )
