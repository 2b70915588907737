"""The score function that generates images: the network, told their classes, with the guidance of the settings."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ncsn.config import Config
from ncsn.config.choices import AutoguidanceConfig
from ncsn.config.schema import SamplingConfig
from ncsn.core.losses import ScoreFunction
from ncsn.core.samplers.chain import sample, visited
from ncsn.core.samplers.guidance import AtLevels, Guided, Labeled, band_on_grid
from ncsn.errors import UserError, shown_value
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork, weights_digest
from ncsn.model.trained import load_for_generation

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
