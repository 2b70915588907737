"""Network, noise, schedule and sampler of the first config.

The networks with preconditioning cost about the same for every size of images. Noise, schedule and sampler are those of
Karras et al. 2022 if the network takes any sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ncsn.config.choices import UnetNetworkConfig
from ncsn.config.noise import LognormalTraining, edm_mean
from ncsn.config.search import significant
from ncsn.core.images import to_unit
from ncsn.core.training_noise import FEW_DRAWS, LognormalNoise
from ncsn.report.facts import duration
from ncsn.tools.draft import Draft
from ncsn.tools.speed import Speed

MOST_REPEATS = 1000  # of an image in training: more of them only memorize it
NFE = 35  # of the sampler
_STD = 1.2  # of ln sigma
_LARGEST = 160  # sigma_1 of Karras et al. over sigma_data: 80 over 0.5
_LEAST = 1.0  # of sigma_1: less would start within the images
_SMALLEST_MAP = 8  # where the network stops halving, and attends
_WIDTHS = ((40, 16), (20, 24), (10, 48), (0, 96))  # channels of feature maps of more pixels a side
_BASE_WIDTHS = ((40, 8), (20, 16), (0, 32))  # of images of more pixels a side


def unet(size: int, *, scale: float) -> dict[str, Any]:
    """A U-Net for images of this size, of `scale` times the usual width; its resolutions cost about the same."""
    maps = [size]
    while maps[-1] > _SMALLEST_MAP or len(maps) < 2:
        maps.append((maps[-1] + 1) // 2)
    return {
        "widths": [int(scale * _at(_WIDTHS, side)) for side in maps],
        "blocks_per_resolution": 1 if scale <= 1 else 2,
        "attention_sizes": [maps[-1]] if size > _SMALLEST_MAP else [],
    }


def ddpmpp(size: int, *, scale: float) -> dict[str, Any]:
    """A DDPM++ network for images of this size, of `scale` times the usual width."""
    maps = [size]
    while maps[-1] % 2 == 0 and (maps[-1] > _SMALLEST_MAP or len(maps) < 2):
        maps.append(maps[-1] // 2)
    return {
        "base_width": max(8, int(scale * _at(_BASE_WIDTHS, size))),
        "multipliers": [1, *[2] * (len(maps) - 1)],
        "blocks_per_resolution": 1 if scale <= 1 else 2,
        "attention_sizes": [],  # the lowest resolution has it anyway
        "dropout": 0.1,
    }


NETWORKS: dict[str, Callable[..., dict[str, Any]]] = {"unet": unet, "ddpmpp": ddpmpp}


def is_wide(network: Mapping[str, Any]) -> bool:
    """Whether these settings of a network have more than the usual channels, which needs a lower learning rate."""
    widths = network.get("widths") or [network.get("base_width", 0) * each for each in network.get("multipliers", [])]
    return max(widths, default=0) > _WIDTHS[-1][1]


def _at(table: tuple[tuple[int, int], ...], side: int) -> int:
    return next(width for least, width in table if side > least)


def choose_noise(draft: Draft, images: npt.NDArray[np.uint8]) -> None:
    """The noise of training and the weight of its loss, for images [N, H, W, C] as training will see them."""
    takes_any = draft.get("network.kind") in NETWORKS
    if takes_any:
        spread = float((to_unit(torch.from_numpy(images)).double() - 0.5).square().mean().sqrt())
        why = "Root mean square of the pixels around mid-gray, measured."
        draft.choose("network.sigma_data", round(max(0.05, spread), 2), why)
    if takes_any and _leaves_open(draft) and draft.section("noise", "geometric"):
        draft.choose("noise.training.kind", "lognormal", "Training draws any sigma (Karras et al. 2022).")
        mean = round(edm_mean(_sigma_data(draft)), 3)
        why = "That of Karras et al. for photographs, moved by ln(sigma_data / 0.25)."
        draft.choose("noise.training.mean", mean, why)
        draft.choose("noise.training.std", _STD)
    elif draft.section("noise", "auto", "Levels from the training images, when training starts (NCSNv2)."):
        draft.choose("noise.sigma_L", 0.01)
    if takes_any and _draws_any(draft):
        draft.choose("loss.weighting", "edm", "The network's own target counts alike at every sigma.")
    elif takes_any:
        draft.choose("loss.anneal_power", 2.5, "With 2.5 the levels weigh about as in Karras et al. 2022.")


def _leaves_open(draft: Draft) -> bool:
    """Whether what is given leaves it open that training draws any sigma."""
    wanted = {
        "loss.kind": "dsm",
        "loss.weighting": "edm",
        "noise.kind": "geometric",
        "noise.training.kind": "lognormal",
    }
    return draft.get("loss.anneal_power") is None and all(
        draft.get(path, kind) == kind for path, kind in wanted.items()
    )


def _draws_any(draft: Draft) -> bool:
    return bool(draft.get("noise.training.kind") == "lognormal" and draft.get("loss.kind", "dsm") == "dsm")


def _sigma_data(draft: Draft) -> float:
    """That of the network, which may be given without it."""
    return float(draft.get("network.sigma_data", UnetNetworkConfig.model_fields["sigma_data"].default))


def choose_training(draft: Draft, *, train_images: int, seconds: float, speed: Speed) -> int:
    """Length and schedule; the number of images."""
    affordable, most = seconds / speed.train_image, MOST_REPEATS * train_images
    every = int(max(significant(min(affordable, most) / 8, 2), 8 * draft.get("train.batch_size")))
    length = 8 * every
    why = f"About {duration(length * speed.train_image)} here; each image {length / train_images:,.0f} times."
    if affordable > most:
        why = f"Each image {MOST_REPEATS} times; with more, training would only memorize them."
    length = int(draft.choose("train.num_images", length, why))
    why = "Half is forgotten over 5 % of the images seen so far, or over 500,000; batch size does not matter."
    draft.section("train.ema", "half_life", why)
    draft.choose("train.checkpoint_every_images", every)
    draft.choose("train.report_every_images", max(draft.get("train.batch_size"), int(significant(length / 100, 2))))
    draft.choose("optimizer.learning_rate", 1e-3 if is_wide(draft.get("network")) else 2e-3)
    draft.choose("optimizer.warmup_images", int(significant(length / 50, 2)))
    draft.choose("optimizer.decay", "cosine")
    if draft.get("noise.kind") == "geometric" and _draws_any(draft):
        _choose_levels(draft, length)
    return length


def _choose_levels(draft: Draft, images: int) -> None:
    """Where the sampler starts and ends, for a training on `images` images."""
    training = LognormalTraining.model_validate(draft.get("noise.training"))
    seen = LognormalNoise(training.mean, training.std).largest_seen(images)
    start = max(_LEAST, min(seen, _LARGEST * _sigma_data(draft)))
    magnitude = 10 ** (math.floor(math.log10(start)) - 1)
    why = (
        f"Where samplers start. Training sees about {FEW_DRAWS:,} draws above {seen:.3g}."
        if seen >= _LEAST
        else "Where samplers start. So short a training sees little of it."
    )
    draft.choose("noise.sigma_1", round(math.floor(start / magnitude + 1e-9) * magnitude, 6), why)
    draft.choose("noise.sigma_L", 0.01, "Where they end: less than the eye sees.")
    draft.choose("noise.num_levels", (NFE + 1) // 2, "For samplers of levels; karras_heun has its own grid.")


def choose_sampling(draft: Draft, *, seconds: float, speed: Speed) -> int:
    """The sampler; the number of images."""
    affordable = seconds / (NFE * speed.evaluate_image)
    count = 2 ** int(math.log2(min(2048, max(64, affordable))))
    count = draft.choose("sampling.num_images", count, "More make the figures of the evaluation more exact.")
    draft.choose("sampling.batch_size", min(draft.get("train.batch_size"), count))
    draft.choose("sampling.precision", "bfloat16" if draft.get("train.precision") != "float32" else "float32")
    if draft.get("data.dequantize", True):
        why = "Gray values as training sees them: k is anything from k/256 to (k + 1)/256."
        draft.choose("sampling.grays", "exact", why)
    if draft.get("network.kind") not in NETWORKS:
        draft.section("sampling.sampler", "annealed_langevin")
    elif draft.section("sampling.sampler", "karras_heun"):
        steps = draft.choose("sampling.sampler.num_steps", (NFE + 1) // 2)
        draft.reasons["sampling.sampler.kind"] = f"{2 * steps - 1} evaluations of the network."
        why = "Fresh noise repairs what a short training gets wrong: half the distance of 0 on digits and clothes."
        draft.choose("sampling.sampler.churn", 10, why)
    return int(count)
