"""Images from a registered model, wherever its run is: the batch path beside `mlflow models serve`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ncsn import storage
from ncsn.config import Config, from_json, from_yaml, to_yaml
from ncsn.distributed.cluster import cluster_for
from ncsn.distributed.sampling import Shard, sample_missing, shards
from ncsn.errors import UserError
from ncsn.evaluation.samples import read_samples
from ncsn.model import checkpoint as checkpoints
from ncsn.model.generate import evaluations_per_image
from ncsn.report.images import grid_png
from ncsn.steps.sample import GRID_IMAGES
from ncsn.tracking.client import open_client_at, shown
from ncsn.tracking.registry import fetch_weights
from ncsn.tracking.versions import registry_errors, resolve_version

MANIFEST = "manifest.json"
MODEL_FOLDER = "model"


@dataclass(frozen=True)
class ModelSamples:
    """Images of a registered model.

    Attributes:
        uri: Folder of the Parquet shards, their manifest and a copy of the weights.
        grid: URI of a PNG with the first images.
        num_images: Images in the folder.
        nfe: Score-network evaluations per image.
        seconds: Duration of this call's sampling.
        model: `models:/<name>/<version>`.
    """

    uri: str
    grid: str
    num_images: int
    nfe: int
    seconds: float
    model: str


def run(
    address: str,
    *,
    registry: str,
    root: str,
    out: str | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[int, int], None],
) -> ModelSamples:
    """Generate the images that are missing in the folder.

    Args:
        address: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        registry: URI of the tracking server.
        root: Store below which the images go if `out` is None, to `generated/<name>/<version>/<settings>`.
        out: Folder for the images.
        overrides: `a.b=value`, on the config that is registered with the model; of its sampling and compute sections.
        progress: Called with (images there, images wanted).

    Raises:
        UserError: for an unknown model, settings that would need another network, or a folder with other images.
    """
    with registry_errors(registry):
        version = resolve_version(open_client_at(registry), address)
    model = f"models:/{version.name}/{version.version}"
    near = storage.absolute(out).rpartition("/")[0] if out else storage.absolute(root)
    with storage.scratch_folder(near) as scratch:
        weights = fetch_weights(registry, version, scratch)
        config = _config(weights, overrides, origin=model)
        source = {
            "model": model,
            "registry": shown(registry),
            "checkpoint_digest": version.tags.get("ncsn.model.checkpoint", ""),
            "sampler": config.sampling.sampler.model_dump(mode="json"),
            "seed": config.sampling.seed,
            "precision": config.sampling.precision,
        }
        place = ("generated", version.name, str(version.version), _digest(source))
        folder = storage.absolute(out) if out else storage.join(near, *place)
        _claim(folder, source)
        storage.publish_folder(weights, storage.join(folder, MODEL_FOLDER), marker=checkpoints.TRAINED_CONFIG)
    return _sample(config, folder, model=model, progress=progress)


def _config(weights: Path, overrides: Sequence[str], *, origin: str) -> Config:
    """The registered config with what the caller changes."""
    registered = from_json((weights / checkpoints.TRAINED_CONFIG).read_text())
    config = from_yaml(to_yaml(registered), overrides=overrides, origin=origin)
    checkpoints.require_same_training(registered, config, origin=origin)
    return config


def _digest(source: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:12]


def _claim(folder: str, source: dict[str, Any]) -> None:
    """Take the folder for images of this source, or find that it is theirs already.

    Raises:
        UserError: if it holds images of another.
    """
    manifest = storage.join(folder, MANIFEST)
    if storage.exists(folder) and storage.list_names(folder) and not storage.exists(manifest):
        raise UserError("--out", "not empty and not a folder of samples", hint="choose another folder", value=folder)
    if storage.publish_once(manifest, json.dumps(source, indent=1).encode()):
        return
    found = storage.read_json(manifest)
    for key, wanted in source.items():
        if found.get(key) != wanted:
            raise UserError(
                "--out",
                f"holds images of {key} {found.get(key)!r}, not of {wanted!r}",
                hint="choose another folder",
                value=folder,
            )


def _sample(config: Config, folder: str, *, model: str, progress: Callable[[int, int], None]) -> ModelSamples:
    sampling = config.sampling
    shard = Shard(
        checkpoint=storage.join(folder, MODEL_FOLDER),
        sampling=sampling,
        folder=folder,
        first=0,
        count=sampling.batch_size,
        threads=config.compute.cpus_per_worker,
        use_gpu=config.compute.use_gpu,
    )
    started = time.perf_counter()
    with cluster_for(config, tasks=len(shards(shard, num_images=sampling.num_images, missing=True))):
        sample_missing(shard, num_images=sampling.num_images, progress=progress)
    count = min(GRID_IMAGES, sampling.num_images)
    grid = storage.join(folder, "grid.png")
    first_images = np.concatenate(list(read_samples(folder, num_images=count, batch_size=count)))
    storage.write_bytes(grid, grid_png(first_images))
    return ModelSamples(
        uri=folder,
        grid=grid,
        num_images=sampling.num_images,
        nfe=evaluations_per_image(config),
        seconds=round(time.perf_counter() - started, 1),
        model=model,
    )
