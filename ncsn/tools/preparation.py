"""Before a training: noise levels suggested for a dataset, and checkpoints that the authors released."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ncsn import storage
from ncsn.config import Config
from ncsn.config.schema import DataConfig
from ncsn.core.images import PixelSpace, to_unit
from ncsn.core.keyed_random import Stream, keyed_uniform
from ncsn.core.networks.released import ReleasedCheckpoint, load_released_checkpoint, read_released_checkpoint
from ncsn.core.noise_schedule import NoiseSuggestion, pair_distances, suggest_noise
from ncsn.data.format import load_manifest
from ncsn.data.parquet import read_blocks
from ncsn.data.sources.base import BadImages
from ncsn.data.sources.known import open_source
from ncsn.data.statistics import ImageSample
from ncsn.data.training_images import open_cache
from ncsn.errors import InvalidValue, UserError
from ncsn.model import build, checkpoint
from ncsn.model.index import INDEX
from ncsn.runs.folder import RunFolder
from ncsn.steps.step import Step
from ncsn.steps.train import TrainResult
from ncsn.training.batches import image_moments

UNIT = PixelSpace()
MOST_IMAGES = 60_000
_MOST_VALUES = 2**31  # uint8 of all images
_BLOCK = 1024
_SIGMA_TOLERANCE = 1e-4


def images_of_dataset(uri: str) -> ImageSample:
    """The train split of an ingested dataset, or a sample of 60,000 images (fewer if they are large)."""
    sample = _empty_sample(math.prod(load_manifest(uri).shape))
    for rows in read_blocks(uri, "train"):
        sample.update(rows.images)
    return sample


def images_of_source(data: DataConfig) -> ImageSample:
    """The same of a source that is not ingested."""
    sample = _empty_sample(data.image_size**2 * data.channels)
    examples = BadImages(skip=data.on_bad_image == "skip").filter(open_source(data).splits["train"].stream())
    while block := list(itertools.islice(examples, _BLOCK)):
        sample.update(np.stack([example.image for example in block]))
    return sample


def suggest_levels(
    sample: ImageSample,
    *,
    mirrored: bool,  # by training
    sigma_L: float,
    overlap: float,  # C of neighboring levels
    steps_per_level: int,  # T, which sampling can afford
    space: PixelSpace,
) -> NoiseSuggestion:
    """Apply techniques 1, 2 and 4 of NCSNv2 to at least two different images, as the network sees them."""
    images = torch.from_numpy(sample.images)
    if space.logit:
        count, height, width, channels = images.shape
        u = keyed_uniform(0, stream=Stream.DEQUANTIZE, first=0, count=count, size=height * width * channels)
        images = space.encode(images, u.view(count, channels, height, width))
    distances = replace(pair_distances(images, flips=mirrored), exact=sample.complete)
    return suggest_noise(
        distances, dimension=images[0].numel(), sigma_L=sigma_L, overlap=overlap, steps_per_level=steps_per_level
    )


def spread_around_gray(sample: ImageSample, *, space: PixelSpace = UNIT) -> float:
    """Root mean square of the pixels around mid-gray, which is the `network.sigma_data` for these images."""
    images, total = sample.images, 0.0
    for first in range(0, len(images), _BLOCK):
        block = to_unit(torch.from_numpy(images[first : first + _BLOCK]))
        total += float((space.transform(block).double() - 0.5).square().sum())
    return math.sqrt(total / images.size)


def _empty_sample(values_per_image: int) -> ImageSample:
    return ImageSample(max(2, min(MOST_IMAGES, _MOST_VALUES // values_per_image)))


def import_checkpoint(config: Config, *, run: str, file: str, dataset: str) -> TrainResult:
    """Write a released file (weights, Adam's moments and step, EMA) as a checkpoint of the run.

    It becomes the result of the run's train step: sampling finds it, and training continues from it. The config has
    the network and the noise levels of the file; the moments of the dataset's images are part of a checkpoint.
    """
    step = Step.claim("train", config, run, TrainResult, unit="images")
    config = step.settle_noise(config, load_manifest(dataset))
    if config.network.kind not in ("ncsn", "ncsnv2"):
        raise UserError(
            "network.kind",
            "no released checkpoint has this network",
            hint="use ncsn or ncsnv2",
            value=config.network.kind,
        )
    with Path(file).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if result := step.found({"imported": digest, "dataset": dataset}, needs=lambda result: [result.checkpoint]):
        return result
    with step.timed() as progress:
        if storage.list_names(step.folder.checkpoints):
            raise UserError("--run", "has checkpoints already", hint="choose another --run NAME", value=run)
        with _wrong_in(file):
            released = read_released_checkpoint(file)
        result = _import(config, released, step.folder, file=file, dataset=dataset)
        progress(result.images_seen, result.images_seen)
    return step.done(result)


def _import(config: Config, released: ReleasedCheckpoint, folder: RunFolder, *, file: str, dataset: str) -> TrainResult:
    state = build.train_state(config)
    with _wrong_in(file):
        load_released_checkpoint(released, network=state.network, optimizer=state.optimizer, ema=state.ema)
    _require_levels(config, released, file=file)
    state.images_seen = released.num_steps * config.train.batch_size
    uri = storage.join(folder.checkpoints, checkpoint.folder_name(state.images_seen))
    with storage.staged_folder(uri, marker=INDEX) as staging:
        checkpoint.snapshot(
            config=config,
            state=state,
            moments=image_moments(config, open_cache(dataset, "train")),
            dataset_digest=load_manifest(dataset).digest,
        ).write(staging)
    return TrainResult(uri, state.images_seen, loss=None, images_per_second=0.0, seconds=0.0, dataset=dataset)


@contextmanager
def _wrong_in(file: str) -> Iterator[None]:
    """Turn an InvalidValue of `ncsn.core` into an error about the file."""
    try:
        yield
    except InvalidValue as error:
        raise UserError(file, str(error).removeprefix(file).lstrip(": ")) from None


def _require_levels(config: Config, released: ReleasedCheckpoint, *, file: str) -> None:
    # Files of NCSNv2 contain their sigmas, those of NCSN do not.
    theirs, ours = released.weights.get("sigmas"), build.sigmas(config)
    if theirs is not None and not torch.allclose(theirs.float(), ours, rtol=_SIGMA_TOLERANCE, atol=0):
        raise UserError(
            "noise",
            f"sigmas from {config.levels.sigma_1:g} to {config.levels.sigma_L:g}, but {file} was trained with sigmas "
            f"from {float(theirs[0]):g} to {float(theirs[-1]):g}",
            hint="set noise.sigma_1 and noise.sigma_L to those of the file",
        )
