"""Images from a trained network, whose score function is told their classes and has the guidance of the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn.config import Config
from ncsn.config.choices import AutoguidanceConfig
from ncsn.config.schema import SamplingConfig
from ncsn.core.images import to_uint8
from ncsn.core.keyed_random import InterpolatedNoise, KeyedNoise
from ncsn.core.losses import ScoreFunction
from ncsn.core.samplers.chain import sample, start, visited
from ncsn.core.samplers.guidance import AtLevels, Guided, Labeled, band_on_grid
from ncsn.errors import InvalidValue, UserError, shown_value
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork, weights_digest
from ncsn.model.classes import labels_of_images
from ncsn.model.trained import load_for_generation
from ncsn.process import keep_freed_memory

CHECKPOINT = "sampling.guidance.checkpoint"


def score_function(trained: TrainedNetwork, sampling: SamplingConfig, *, labels: Tensor | None) -> ScoreFunction:
    """The score function for images of these labels, int64 [B]; None without classes."""
    labels = None if labels is None else labels.to(_device(trained))
    levels, guidance = build.sampled_sigmas(trained.config, sampling), sampling.guidance
    network = trained.network if sampling.levels is None else AtLevels(trained.network, levels)
    score = network if labels is None else Labeled(network, labels)
    if guidance is None or guidance.weight == 1:
        return score
    if isinstance(guidance, AutoguidanceConfig):
        worse = guide_of(trained, sampling)
        assert worse is not None
        knows = worse.config.data.num_classes is not None
        guide = Labeled(worse.network, labels) if knows and labels is not None else worse.network
    else:
        assert labels is not None, "the config's rules"
        guide = Labeled(network, torch.full_like(labels, -1))
    band = band_on_grid(guidance.sigma_min, guidance.sigma_max, visited(sampling.sampler, levels))
    return Guided(score, guide, weight=guidance.weight, band=band, sigmas=levels)


def evaluations_per_image(config: Config) -> int:
    """NFE of an image by the config's sampler, of both networks together under guidance."""
    guidance, sampler = config.sampling.guidance, config.sampling.sampler
    levels = build.sampled_sigmas(config, config.sampling)
    whole = sampler.num_evaluations(len(levels))
    if guidance is None or guidance.weight == 1:
        return whole
    # Those of a chain whose scores are zero.
    band = band_on_grid(guidance.sigma_min, guidance.sigma_max, visited(sampler, levels))
    guided = Guided(_Zero(), _Zero(), weight=guidance.weight, band=band, sigmas=levels)
    nothing = torch.zeros(1, 1, 1, 1)
    sample(sampler, guided, x=nothing, sigmas=levels, noise=lambda _: nothing)
    return guided.evaluations


class _Zero:
    def __call__(self, x: Tensor, level: Tensor) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(x)

    def score_at(self, x: Tensor, sigma: Tensor) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(x)


def guide_of(trained: TrainedNetwork, sampling: SamplingConfig) -> TrainedNetwork | None:
    """The worse network of autoguidance, which a registered model has with it; None for other settings."""
    guidance, own = sampling.guidance, trained.config.sampling.guidance
    if not isinstance(guidance, AutoguidanceConfig):
        return None
    packed = isinstance(own, AutoguidanceConfig) and own.checkpoint == guidance.checkpoint
    if packed and trained.guide is not None:
        return trained.guide
    if guidance.checkpoint.startswith("models:/"):
        raise UserError(
            CHECKPOINT, "a registered model is copied by the steps of a run only", value=guidance.checkpoint
        )
    guide = _load(guidance.checkpoint, str(_device(trained)))
    _require_fitting(trained, guide, guidance.checkpoint, sampling)
    return guide


def sampling_facts(sampling: SamplingConfig, guide: TrainedNetwork | None) -> dict[str, Any]:
    """What decides image i of a network's samples, as plain values; a guide by its weights, wherever they are."""
    chosen = {"sampler", "seed", "precision", "grays", "label", "guidance", "levels"}
    facts: dict[str, Any] = sampling.model_dump(mode="json", include=chosen)
    if guide is not None:
        facts["guidance"] = {**facts["guidance"], "checkpoint": weights_digest(guide.network)}
    return facts


def _device(trained: TrainedNetwork) -> torch.device:
    return next(trained.network.parameters()).device


@lru_cache(maxsize=1)
def _load(uri: str, device: str) -> TrainedNetwork:
    try:
        return load_for_generation(uri, device=device)
    except UserError as error:
        raise UserError(CHECKPOINT, f"cannot be read: {error}", value=uri) from None


def _require_fitting(trained: TrainedNetwork, guide: TrainedNetwork, uri: str, sampling: SamplingConfig) -> None:
    """Refuse a guide for other images, other classes, or of other levels if it knows its own only."""

    def facts(network: TrainedNetwork) -> dict[str, object]:
        data = network.config.data
        return {"image_size": data.image_size, "channels": data.channels}

    wanted, found = facts(trained), facts(guide)
    if None not in (trained.classes, guide.classes):
        wanted["classes"], found["classes"] = trained.classes.names, guide.classes.names  # type: ignore[union-attr]
    if not hasattr(guide.network, "score_at"):
        wanted["noise"], found["noise"] = build.sampled_levels(trained.config, sampling), guide.config.levels
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(
                CHECKPOINT,
                f"its {name} is {shown_value(found[name])}, but the network's is {shown_value(value)}",
                value=uri,
            )


def generate(
    trained: TrainedNetwork,
    *,
    sampling: SamplingConfig,
    first: int,
    count: int,
    device: str | torch.device = "cpu",
    on_level: Callable[[int, Tensor], None] | None = None,
) -> NDArray[np.uint8]:
    """Images `first .. first + count` of the seed as one batch, uint8 `[count, H, W, C]`; the same in any batch.

    Args:
        trained: Its network is on `device`.
        on_level: Receives the number of each stage and the state as pixels around [0, 1]: 0 is the start, then one per
            visited level.

    Raises:
        UserError: An image is not finite.
    """
    noise = KeyedNoise(sampling.seed, first=first, count=count, shape=image_shape(trained.config), device=device)
    labels = image_labels(trained, sampling, first=first, count=count)
    x = sampled(trained, sampling, noise=noise, labels=labels, device=device, on_level=on_level)
    if broken := int((~torch.isfinite(x)).flatten(1).any(1).sum()):
        raise UserError(
            "sampling.sampler",
            f"{broken} of images {first} to {first + count - 1} are not finite",
            hint="lower its step size, or train longer",
            value=asdict(sampling.sampler),
        )
    return level_images(x, sampling, trained.config)


def sampled(
    trained: TrainedNetwork,
    sampling: SamplingConfig,
    *,
    noise: KeyedNoise | InterpolatedNoise,
    labels: Tensor | None,
    device: str | torch.device = "cpu",
    on_level: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The chain of the configured sampler from its start to its end, [B, C, H, W] with pixels around [0, 1]."""
    config, sampler = trained.config, sampling.sampler
    levels = build.sampled_levels(config, sampling)
    with inference(sampling, device):
        x = start(sampler, trained.moments, sigma_1=levels.sigma_1, noise=noise)
        if on_level is not None:
            on_level(0, x)
        return sample(
            sampler,
            score_function(trained, sampling, labels=labels),
            x=x,
            sigmas=build.sampled_sigmas(config, sampling).to(device),
            noise=noise,
            on_level=None if on_level is None else lambda level, state: on_level(level + 1, state),
        )


def image_labels(trained: TrainedNetwork, sampling: SamplingConfig, *, first: int, count: int) -> Tensor | None:
    """Classes of images `first .. first + count` of the seed, int64 [count]; None for a network without classes."""
    num_classes = trained.config.data.num_classes
    if num_classes is None:
        return None
    return labels_of_images(
        sampling.label, num_classes=num_classes, classes=trained.classes, seed=sampling.seed, first=first, count=count
    )


@contextmanager
def inference(sampling: SamplingConfig, device: str | torch.device, *, derivatives: bool = False) -> Iterator[None]:
    """Evaluate networks in the precision of the settings; `derivatives` may be enabled inside."""
    kind, bfloat16 = torch.device(device).type, sampling.precision == "bfloat16"
    if kind == "cpu":
        keep_freed_memory()
    mode = torch.no_grad() if derivatives else torch.inference_mode()
    with mode, torch.autocast(kind, dtype=torch.bfloat16, enabled=bfloat16):
        yield


def image_shape(config: Config) -> tuple[int, int, int]:
    """[C, H, W]."""
    return (config.data.channels, config.data.image_size, config.data.image_size)


def level_images(x: Tensor, sampling: SamplingConfig, config: Config) -> NDArray[np.uint8]:
    """The images of a state, uint8 `[N, H, W, C]`."""
    dequantized = sampling.grays == "exact" and config.data.dequantize
    try:
        images: NDArray[np.uint8] = to_uint8(x, dequantized=dequantized).cpu().numpy()
    except InvalidValue as error:
        raise UserError("sampling.sampler", str(error), value=asdict(sampling.sampler)) from None
    return images
