"""Images from registered models."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ncsn import storage
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.distributed.cluster import cluster_for
from ncsn.distributed.sampling import make_shards, plan_shards
from ncsn.errors import UserError
from ncsn.evaluation.features import SampleSet
from ncsn.model import checkpoint as checkpoints
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import require_label
from ncsn.model.generate import evaluations_per_image, guide_of, sampling_facts, with_precision
from ncsn.model.trained import TRAINED_CONFIG, load_model
from ncsn.progress import Progress
from ncsn.runs.folder import Store
from ncsn.steps.sample import class_rows, first_images_png
from ncsn.tracking.client import SQLITE, client_at, mlflow_errors, shown
from ncsn.tracking.promotion import resolve_version
from ncsn.tracking.registry import copy_guide, fetch_weights

MANIFEST = "manifest.json"
MODEL_FOLDER = "model"


@dataclass(frozen=True)
class ModelSamples:
    """Images of a registered model."""

    uri: str  # folder with the Parquet shards, their manifest and a copy of the weights
    grid: str  # URI of a PNG with the first images
    num_images: int
    nfe: int
    seconds: float  # of this call
    model: str  # `models:/<name>/<version>`


def sample_model(
    address: str,
    *,
    registry: str,  # URI of the tracking server
    root: str,  # the images go to `<root>/generated/<name>/<version>/<settings>`
    overrides: Sequence[str] = (),  # of the sampling and compute sections of the registered config
    progress: Progress,
) -> ModelSamples:
    """Generate the images of `models:/NAME@ALIAS` or `models:/NAME/VERSION` that are missing in the folder."""
    with mlflow_errors(registry):
        version = resolve_version(client_at(registry), address)
    model = f"models:/{version.name}/{version.version}"
    root = storage.absolute(root)
    with storage.scratch_folder(root) as scratch:
        weights = fetch_weights(registry, version, scratch)
        trained = load_model(weights, origin=model)
        config = copy_guide(_config(trained, overrides, origin=model), folder=Store(root).guides, registry=registry)
        source = {
            "model": model,
            "registry": shown(registry).removeprefix(SQLITE),
            "checkpoint_digest": version.tags.get("ncsn.checkpoint", ""),
            **sampling_facts(
                with_precision(config.sampling, trained, config.compute.device), guide_of(trained, config.sampling)
            ),
        }
        source = storage.relative_uris(source, root)
        folder = storage.join(Store(root).generated, version.name, str(version.version), storage.digest(source, 12))
        storage.write_json(storage.join(folder, MANIFEST), source, indent=1)
        storage.publish_folder(weights, storage.join(folder, MODEL_FOLDER), marker=TRAINED_CONFIG)
    shards = plan_shards(config, checkpoint=storage.join(folder, MODEL_FOLDER), folder=folder)
    started = time.perf_counter()
    with cluster_for(config, start=len(shards) > 1):
        make_shards(config, shards, progress=progress)
    grid = storage.join(folder, "grid.png")
    images = SampleSet(folder, config.sampling.num_images)
    storage.write_bytes(grid, first_images_png(images, class_rows(config, images)))
    seconds = round(time.perf_counter() - started, 1)
    return ModelSamples(folder, grid, config.sampling.num_images, evaluations_per_image(config), seconds, model)


def _config(trained: TrainedNetwork, overrides: Sequence[str], *, origin: str) -> Config:
    """The registered config with the changes; refuses those that the model cannot follow."""
    registered = trained.config
    # Nothing is measured here, so that rules of the evaluation do not matter, such as its least number of images.
    unmeasured = ("evaluation.num_splits=1",)
    config = from_yaml(to_yaml(registered), overrides=[*unmeasured, *overrides], origin=origin)
    checkpoints.require_same_training(registered, config, origin=origin)
    require_label(config.sampling.label, trained.classes)
    if (width := config.sampling.relative_width) != registered.sampling.relative_width:
        raise UserError(
            "sampling.relative_width",
            f"{origin} has the weights that it was registered with, and no snapshots of others",
            hint="sample its run with `ncsn sample --run NAME`",
            value=width,
        )
    return config


def run_of_images(images: ModelSamples, *, root: str, overrides: Sequence[str] = ()) -> tuple[Config, str]:
    """The config to evaluate the images with, in the store `root`, and a run name that no other images have.

    What the registered evaluation measures of more images than there are is left out, unless `overrides` ask for it.
    """
    origin = storage.join(images.uri, MODEL_FOLDER, TRAINED_CONFIG)
    text, count = storage.read_text(origin), images.num_images
    registered = from_yaml(text, origin=images.model).evaluation
    fitting = [f"evaluation.num_splits={min(registered.num_splits, count)}"]
    own = [f"storage.root={root}"]
    config = from_yaml(text, overrides=[*fitting, *overrides, *own], origin=images.model)
    model = re.sub(r"[^a-z0-9]+", "-", images.model.removeprefix("models:/").lower())[:40]
    return config, f"{model.strip('-')}-{images.uri.rpartition('/')[2]}"
