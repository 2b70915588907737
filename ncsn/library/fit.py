"""Training in one process, from an array, a folder or a torch dataset to a `ScoreModel`; without MLflow and Ray."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ncsn.config import Config
from ncsn.data.dataset import write_dataset
from ncsn.data.format import NO_LABEL
from ncsn.data.noise_levels import resolve_noise
from ncsn.data.pixels import MOST_CHANNELS, Fit, Picture
from ncsn.data.sources import open_source
from ncsn.data.sources.base import Source
from ncsn.data.sources.published_sets import Arrays
from ncsn.errors import UserError
from ncsn.init.choose import TRAINING, choose
from ncsn.init.plan import Machine
from ncsn.init.survey import MOST_LOOKED_AT, Look, Survey, survey
from ncsn.library.model import ScoreModel
from ncsn.model.checkpoint import CheckpointStore, load_checkpoint
from ncsn.progress import Progress
from ncsn.report.images import evenly_spread
from ncsn.runs.layout import images_seen_at
from ncsn.storage import CACHE_DIR_VARIABLE, cache_folder, scratch_folder
from ncsn.storage.heartbeat import LeaseExpired
from ncsn.training.context import WorkerContext
from ncsn.training.loop import DivergedError, TrainingJob, train_loop

_LEAST_SIDE = 8  # of `data.image_size`


def fit(
    images: NDArray[Any] | Tensor | Dataset[Any] | str | os.PathLike[str],
    labels: ArrayLike | None = None,
    *,
    network: str | Mapping[str, Any] = "unet",
    hours: float = 0.25,
    seed: int = 0,
    on_progress: Callable[[int, int], object] | None = None,
) -> ScoreModel:
    """Train a score network in this process, on a GPU if there is one.

    All settings, of the network too, are chosen to fit the images, the machine and the time, as by `ncsn init`.

    Args:
        images: An array [N, H, W] or [N, H, W, C], uint8 or floats in [0, 1], C from 1 to 8. A map-style dataset of
            torch, whose items are PIL images, arrays [H, W, C] or tensors [C, H, W], alone or each with a label, all of
            one size. Or a folder, an archive, a Parquet file or an s3:// prefix, of any images.
        labels: A class for each image of an array or a dataset, numbers or names [N].
        network: unet, ddpmpp or ncsn; or {"kind": ..., ...} with settings of the section `network` of a config.
            All but a unet have by default the size of their paper, for a GPU.
        hours: When training ends, by the clock, counted from this call; earlier if each image was seen a thousand
            times. It makes one step at least.
        seed: Of the weights, the order of images and the noise.
        on_progress: Called with the number of images that training has seen, and of those that it is to see. What it
            raises ends training.

    Raises:
        UserError: The images cannot be used, the network does not fit them, or training diverged.
    """
    given: Any = hours  # whatever a caller gives
    if not isinstance(given, int | float | np.number) or not 0 < given < float("inf"):
        raise UserError("hours", f"must be a number above 0, not {hours!r}")
    ends = time.monotonic() + 3600 * hours
    here, threads = Machine.here(), torch.get_num_threads()
    chosen = network if isinstance(network, Mapping) else {"kind": network}
    settings = [
        *(f"network.{key}={json.dumps(value)}" for key, value in chosen.items()),
        f"seed={seed}",
        "compute.num_workers=1",
        f"compute.cpus_per_worker={threads}",
        "data.test_fraction=1e-9",  # one image of a folder: nothing is measured here
    ]
    source = None
    try:
        if not isinstance(images, str | os.PathLike):
            source, found = _in_memory(images, labels)
            (width, height), channels = found.looks[0].size, found.looks[0].bands
            settings += [f"data.image_size=[{height}, {width}]", f"data.channels={channels}"]
            if source.class_names:
                settings.append(f"data.num_classes={len(source.class_names)}")
        elif labels is None:
            found = survey(os.fspath(images))
        else:
            raise UserError("labels", "a folder has its own", hint="leave them out")
        config = choose(
            found,
            seconds=3600 * hours / TRAINING,
            startup=0.0,
            overrides=settings,
            machine=replace(here, cores=threads, gpus=min(1, here.gpus)),
        ).config
        return _train(config, source or open_source(config.data), on_progress, ends)
    except UserError as error:
        words = {"PLACE": "images", "data.root": "images", "data.image_size": "image size", "--set": ""}
        raise error.reworded(words) from error


def _train(config: Config, source: Source, on_progress: Callable[[int, int], object] | None, ends: float) -> ScoreModel:
    """The training loop on the source's training images, with all its files in a temporary folder."""

    class Told(Progress):
        def changed(self) -> None:
            if on_progress is not None:
                on_progress(self.done, self.total)
            if time.monotonic() > ends:
                Path(stop).touch()

    with tempfile.TemporaryDirectory(prefix="ncsn-") as folder:
        images = replace(source, splits={"train": source.splits["train"]})
        dataset = write_dataset(images, f"{folder}/dataset", name="images", data=config.data)
        cached = cache_folder() / dataset.manifest.digest
        try:
            was_cached = cached.exists()
            with scratch_folder(place := str(cache_folder())):
                pass
        except OSError as error:
            raise UserError(CACHE_DIR_VARIABLE, f"cannot be written: {error.strerror}", value=place) from error
        checkpoints = CheckpointStore(f"{folder}/checkpoints", keep=1)
        told, stop, config = Told(), f"{folder}/stop", resolve_noise(config, dataset.manifest)
        job = TrainingJob(config, dataset.uri, progress=told, stop=stop)
        try:
            with suppress(LeaseExpired):  # the time is over, and the state is saved
                train_loop(job, WorkerContext(config.compute.device), checkpoints)
        finally:
            if not was_cached:
                shutil.rmtree(cached, ignore_errors=True)
        if (name := checkpoints.newest()) is None:
            raise DivergedError("hours", "were over when training had diverged", hint="give other images or settings")
        told.start(images_seen_at(name), "images", done=images_seen_at(name))
        trained = load_checkpoint(f"{checkpoints.uri}/{name}", device=config.compute.device)
        known = images.splits["train"]
        return ScoreModel(trained, training=np.asarray(known.images) if isinstance(known, Arrays) else None)


def _in_memory(images: Any, labels: ArrayLike | None) -> tuple[Source, Survey]:
    """An array or dataset as a source of images, and what `choose` asks about them."""
    if not isinstance(images, np.ndarray):
        if not hasattr(images, "__len__"):
            raise UserError("images", "are neither array, dataset nor place", value=type(images).__name__)
        items = [images[number] for number in range(len(images))]
        if items and isinstance(items[0], tuple | list):
            labels = [item[1] for item in items] if labels is None else labels
            items = [item[0] for item in items]
        pixels = list(map(_pixels, items))
        if len({each.shape for each in pixels}) != 1:
            raise UserError("images", "are none, or not of one size", hint="resize them in the dataset")
        images = np.stack(pixels)
    images = images[..., None] if images.ndim == 3 else images
    count, height, width, channels = images.shape if images.ndim == 4 else (0, 0, 0, 0)
    if not count or min(height, width) < _LEAST_SIDE or not 1 <= channels <= MOST_CHANNELS:
        hint = f"give images [N, H, W, C] of {_LEAST_SIDE} pixels a side or more, with C from 1 to {MOST_CHANNELS}"
        raise UserError("images", f"have the shape {list(images.shape)}", hint=hint)
    if images.dtype != np.uint8:
        if images.dtype.kind != "f" or not (images.min() >= 0 and images.max() <= 1):
            reason = f"are {images.dtype} from {images.min():g} to {images.max():g}"
            raise UserError("images", reason, hint="give uint8, or floats in [0, 1]")
        images = np.floor(images * 255 + 0.5).astype(np.uint8)
    names, numbers = np.empty(0), np.full(count, NO_LABEL)
    if labels is not None:
        names, numbers = np.unique(np.asarray(labels), return_inverse=True)
        if numbers.shape != (count,):
            raise UserError("labels", f"have the shape {list(numbers.shape)}", hint=f"give {count}, one for each image")
    train = Arrays(images, numbers, Fit((height, width), channels))
    source = Source("memory", "", tuple(map(str, names.tolist())), {"train": train})
    found = Survey(
        root="memory",
        source="parquet",  # as which training reads them
        num_images=count,
        class_names=source.class_names,
        class_counts=tuple(np.bincount(numbers).tolist()) if source.class_names else (),
        looks=tuple(
            Look(f"image {number}", "", (width, height), Picture.of(images[number]).image, channels, ())
            for number in evenly_spread(count, most=MOST_LOOKED_AT)
        ),
    )
    return source, found


def _pixels(item: Any) -> NDArray[Any]:
    """The image of an item, [H, W] or [H, W, C]."""
    if isinstance(item, Tensor):
        return (item.movedim(0, 2) if item.ndim == 3 else item).numpy()
    if isinstance(item, Image.Image):
        return np.asarray(Fit((1, 1), 3).plain(Picture(item)).image)  # gray or RGB
    return np.asarray(item)
