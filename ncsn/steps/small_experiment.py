"""The experiment that a rehearsal runs in place of the real one: the same but for its size and its places."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ncsn.config import Config, from_yaml, to_yaml
from ncsn.data.parquet import write_dataset
from ncsn.data.sources import open_source
from ncsn.data.statistics import resolve_noise
from ncsn.data.training_images import CACHE_DIR_VARIABLE
from ncsn.model.generate import evaluations_per_image
from ncsn.planning import Counts

RUN = "rehearsal"
IMAGES, FEW_IMAGES = 2048, 256
"""Images of each split that are rehearsed with; the few where each takes long, and to see what one image takes."""


def settle(config: Config) -> Config:
    """The config with noise levels, which `noise: auto` takes here from some of its images."""
    if config.noise.kind != "auto":
        return config
    with tempfile.TemporaryDirectory(prefix="ncsn-plan-") as folder:
        data = with_values(config, **{"data.max_images": min(IMAGES, config.data.max_images or IMAGES)}).data
        return resolve_noise(config, write_dataset(open_source(data), folder, name=RUN, data=data).manifest)


def count(config: Config) -> Counts:
    """How much of everything the config asks for."""
    splits = open_source(config.data).splits
    sampling = config.sampling
    return Counts(
        train_images=splits["train"].count,
        test_images=splits["test"].count,
        shards=math.ceil(sampling.num_images / sampling.batch_size),
        nfe=evaluations_per_image(config),
    )


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Keep the rehearsal's images out of this node's cache, here and in the workers of a cluster that starts now."""
    before = os.environ.get(CACHE_DIR_VARIABLE)
    os.environ[CACHE_DIR_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[CACHE_DIR_VARIABLE]
        else:
            os.environ[CACHE_DIR_VARIABLE] = before


def scaled_down(config: Config, root: Path) -> Config:
    """The experiment on a few images, in a store and with a record of its own below `root`."""
    images = FEW_IMAGES if config.evaluation.extractor == "inception" else IMAGES
    samples = config.sampling.batch_size * config.compute.max_workers
    return with_values(
        config,
        **{
            "compute.backend": "local",
            "compute.num_workers": config.compute.max_workers,
            "storage.root": str(root),
            "tracking.uri": f"sqlite:///{root}/mlflow.db",
            "data.max_images": min(images, config.data.max_images or images),
            "sampling.num_images": samples,
            "evaluation.classifier_epochs": 1,
            "evaluation.num_splits": 1,
        },
    )


def with_values(config: Config, **values: Any) -> Config:
    """The config with other values, dotted path -> value."""
    overrides = [f"{path}={json.dumps(value)}" for path, value in values.items()]
    return from_yaml(to_yaml(config), overrides=overrides)
