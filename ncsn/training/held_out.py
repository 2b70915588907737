"""The held-out loss of a training: as it goes, with the EMA weights, without augmentation and dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ncsn.config import Config
from ncsn.core.keyed_random import COMMON_SEED, Stream
from ncsn.core.losses import losses_at
from ncsn.core.samplers.chain import choose_levels
from ncsn.core.training import EVALUATIONS_PER_STEP, TrainState
from ncsn.core.training_noise import LevelNoise
from ncsn.data.format import Rows, load_manifest
from ncsn.data.training_images import TrainingImages, open_training_images
from ncsn.model import build
from ncsn.model.objective import Objective
from ncsn.runs.history import GAP, HELD_OUT_EDM, LOSS, Array
from ncsn.training.batches import encoded, gray_words
from ncsn.training.context import WorkerContext

SHARE = 0.02  # of the training time that the held-out loss may take
MOST_BINS = 10  # noise levels
MOST_IMAGES = 1000  # of each set
FEW_IMAGES = 50  # with fewer, it is measured less often instead


def effort_of(config: Config, *, bins: int, held_out: int, training: int) -> tuple[int, int, int] | None:
    """What fits in `SHARE` of the time for `bins` noise levels and splits of these sizes; None if that is nothing.

    Numbers of held-out images, of training images, and of training images between two measurements.
    """
    between = min(config.train.checkpoint_every_images, config.train.num_images)
    affordable = SHARE * EVALUATIONS_PER_STEP * between / bins  # images of both sets at each measurement
    held_out, training = min(held_out, MOST_IMAGES), min(training, MOST_IMAGES)
    least = min(FEW_IMAGES, held_out) + min(FEW_IMAGES, training)
    checkpoints = max(1, math.ceil(least / affordable))
    if held_out == 0 or checkpoints * between > config.train.num_images:
        return None
    room = int(checkpoints * affordable)
    # The smaller set decides how much the two can tell.
    smaller = min(held_out, training, room // 2)
    larger = min(max(held_out, training), room - smaller)
    sizes = (smaller, larger) if held_out <= training else (larger, smaller)
    return *sizes, checkpoints * between


@dataclass(frozen=True)
class ImageShare:
    """This worker's share of a set of images."""

    rows: Rows
    places: range  # in the set
    whole: int  # images of the set
    noise: int  # stream
    dequantize: int  # stream


@dataclass(frozen=True)
class Probe:
    """Measures the loss of held-out and of training images, after each `every` training images.

    All workers call the same methods in the same order.
    """

    config: Config
    objective: Objective
    sigmas: Tensor  # at which the loss is measured [S]
    levels: list[int] | None  # their numbers if they are levels of the network
    sets: list[ImageShare]  # held-out and training images
    every: int
    context: WorkerContext

    def measure(self, state: TrainState, *, dtype: torch.dtype | None) -> dict[str, float]:
        """Metrics `val/...` of the EMA weights, whose convolutions compute in `dtype`. A collective call.

        Draws from no generator, so that training goes on as without it.
        """
        network, objective = state.averaged(), self.objective
        held_out, training = (self._losses(network, each, dtype).mean(axis=1) for each in self.sets)
        sigmas = self.sigmas.double()
        assert objective.weight is not None, "open_probe"
        weights = objective.weight(sigmas).numpy()
        share = weights / weights.sum()
        point = {LOSS: float(share @ held_out), GAP: float(share @ (held_out - training))}
        # The objective of Karras et al., if each of the levels is as probable.
        if (edm := objective.edm_weight) is not None:
            point[HELD_OUT_EDM] = float((edm(sigmas).numpy() * held_out).mean())
        return {name: value for name, value in point.items() if math.isfinite(value)}

    def _losses(self, network: nn.Module, share: ImageShare, dtype: torch.dtype | None) -> Array:
        """Loss at each sigma of each image of the whole set, [S, N]."""
        config, context = self.config, self.context
        size = max(1, config.train.batch_size // context.world_size)
        losses = torch.zeros(len(self.sigmas), share.whole, dtype=torch.float64, device=context.device)
        kind = context.device.type
        autocast = torch.autocast(kind, dtype=dtype, enabled=dtype is not None)
        size = min(size, config.compute.microbatch or size)
        with torch.inference_mode(), build.without_search(), autocast:
            for first in range(0, len(share.places), size):
                places, part = share.places[first : first + size], slice(first, first + size)
                images, labels = torch.from_numpy(share.rows.images[part]), torch.from_numpy(share.rows.labels[part])
                gray = gray_words(config, images, seed=COMMON_SEED, stream=share.dequantize, first=places.start)
                losses[:, places.start : places.stop] = losses_at(
                    network,
                    encoded(config, images, gray).to(context.device, memory_format=build.memory_format(config)),
                    first=places.start,
                    sigmas=self.sigmas,
                    levels=self.levels,
                    stream=share.noise,
                    labels=None if config.data.num_classes is None else labels.to(context.device),
                )
        # Each image is one worker's, so the sum is the same for any number of workers.
        values: Array = context.sum_over_workers(losses).cpu().numpy()
        return values


def open_probe(
    config: Config, objective: Objective, dataset: str, training: TrainingImages, context: WorkerContext
) -> Probe | None:
    """The probe of a training, with this worker's share of the images; None if it has none, or no time for it."""
    if objective.weight is None:
        return None
    count = load_manifest(dataset).counts.get("test", 0)
    levels, sigmas = None, objective.noise.bins
    if isinstance(objective.noise, LevelNoise):
        known = objective.noise.sigmas
        levels = choose_levels(known, min(MOST_BINS, len(known)) if len(known) > 1 else None)
        sigmas = known[levels]
    effort = effort_of(config, bins=len(sigmas), held_out=count, training=len(training))
    if effort is None:
        return None
    held_out, (first, second, every) = open_training_images(dataset, "test"), effort
    shares = []
    for split, whole, noise, dequantize in (
        (held_out, first, Stream.HELD_OUT_NOISE, Stream.HELD_OUT_DEQUANTIZE),
        (training, second, Stream.TRAINED_NOISE, Stream.TRAINED_DEQUANTIZE),
    ):
        places = context.share(whole)
        # A random choice, because a split may be sorted by class.
        chosen = split.order(COMMON_SEED, first=places.start, count=len(places))
        shares.append(ImageShare(split.rows(chosen), places, whole, noise, dequantize))
    return Probe(config, objective, sigmas, levels, shares, every, context)
