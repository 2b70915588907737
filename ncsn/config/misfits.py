"""Settings that are each valid but do not go together, found before hours of work end in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ncsn.config.losses import SingleSigmaLossConfig, SsmLossConfig
from ncsn.config.networks import NcsnNetworkConfig, NcsnV2NetworkConfig, UnetNetworkConfig
from ncsn.config.noise import NoiseConfig
from ncsn.config.samplers import (
    AnnealedLangevinConfig,
    ConsistentAnnealedConfig,
    KarrasHeunConfig,
    LangevinConfig,
    PredictorCorrectorConfig,
    ProbabilityFlowConfig,
)

if TYPE_CHECKING:
    from ncsn.config.schema import Config

_HALVINGS = {"standard": 1, "deeper": 2, "deepest": 3}


def misfits(config: Config) -> list[str]:
    """One line for each pair of settings that do not fit, naming both by their dotted paths."""
    checks = (_batch, _compiled_loss, _logits, _network_size, _one_level, _sampler_network, _sampler_levels, _splits)
    return [line for check in checks for line in check(config)]


def _batch(config: Config) -> Iterator[str]:
    batch, workers = config.train.batch_size, config.compute.max_workers
    if batch < workers:
        yield (
            f"train.batch_size = {batch} leaves some of compute.num_workers = {workers} without an image; "
            "raise the one or lower the other"
        )


def _compiled_loss(config: Config) -> Iterator[str]:
    if config.compute.compile and isinstance(config.loss, SsmLossConfig):
        yield (
            "compute.compile = true cannot train with loss.kind = ssm, which differentiates the network twice; "
            "use compute.compile = false"
        )


def _network_size(config: Config) -> Iterator[str]:
    network, size = config.network, config.data.image_size
    if isinstance(network, UnetNetworkConfig):
        sizes = [size]
        while len(sizes) < len(network.widths):
            sizes.append((sizes[-1] + 1) // 2)
        if sizes[:-1].count(1):
            yield (
                f"network.widths has {len(network.widths)} entries, but data.image_size = {size} can be halved only "
                f"{sizes.index(1)} times; use at most {sizes.index(1) + 1} widths"
            )
        elif missing := sorted(set(network.attention_sizes) - set(sizes)):
            yield (
                f"network.attention_sizes = {missing} do not occur: feature maps of data.image_size = {size} with "
                f"{len(sizes)} network.widths have sizes {sizes}; choose among these"
            )
        return
    step = 2 ** (_HALVINGS[network.depth] if isinstance(network, NcsnV2NetworkConfig) else 1)
    if size % step:
        yield (
            f"data.image_size = {size} is not divisible by {step}, which network.kind = {network.kind} needs; "
            f"use {size - size % step} or {size + step - size % step}"
        )


def _logits(config: Config) -> Iterator[str]:
    if config.data.logit_transform and config.noise.kind == "auto":
        yield (
            "noise: auto is measured on pixels, but data.logit_transform = true trains on their logits; "
            "use the section noise that `ncsn suggest-noise --config` prints"
        )


def _one_level(config: Config) -> Iterator[str]:
    sampler, num_levels = config.sampling.sampler, getattr(config.noise, "num_levels", "auto")
    if isinstance(config.loss, SingleSigmaLossConfig) and num_levels != 1:
        yield (
            f"loss.kind = single_sigma trains at one noise level, but noise.num_levels = {num_levels}; "
            "use noise.num_levels = 1 with noise.sigma_1 = noise.sigma_L"
        )
    if num_levels == 1 and not isinstance(sampler, LangevinConfig):
        yield (
            f"sampling.sampler.kind = {sampler.kind} goes through several noise levels, but noise.num_levels = 1; "
            "use sampling.sampler.kind = langevin"
        )


def _sampler_network(config: Config) -> Iterator[str]:
    """Samplers that go between the network's levels."""
    sampler = config.sampling.sampler
    if not isinstance(config.network, NcsnNetworkConfig):
        return
    if isinstance(sampler, KarrasHeunConfig):
        setting, instead = "kind = karras_heun", "probability_flow"
    elif isinstance(sampler, ConsistentAnnealedConfig) and sampler.refine > 1:
        setting, instead = f"refine = {sampler.refine}", "refine = 1"
    else:
        return
    yield (
        f"sampling.sampler.{setting} needs a network that takes any sigma, and network.kind = ncsn knows its own "
        f"noise levels only; use {instead}, or network.kind = ncsnv2 or unet"
    )


def _sampler_levels(config: Config) -> Iterator[str]:
    sampler, noise = config.sampling.sampler, config.noise
    if not isinstance(noise, NoiseConfig):
        return
    if isinstance(sampler, LangevinConfig) and not -noise.num_levels <= sampler.level < noise.num_levels:
        yield (
            f"sampling.sampler.level = {sampler.level} is not among noise.num_levels = {noise.num_levels}; "
            f"use 0 to {noise.num_levels - 1}, or -1 for the last"
        )
    if isinstance(sampler, AnnealedLangevinConfig) and sampler.consistent and sampler.epsilon > noise.sigma_L**2:
        yield (
            f"sampling.sampler.epsilon = {sampler.epsilon:g} is more than noise.sigma_L^2 = {noise.sigma_L**2:g}, the "
            "largest with sampling.sampler.consistent = true; lower it"
        )
    if (
        isinstance(sampler, PredictorCorrectorConfig | ProbabilityFlowConfig)
        and sampler.num_levels is not None
        and sampler.num_levels > noise.num_levels
    ):
        yield (
            f"sampling.sampler.num_levels = {sampler.num_levels} is more than noise.num_levels = {noise.num_levels}; "
            "use fewer, or null for all"
        )
    if isinstance(sampler, ConsistentAnnealedConfig) and noise.num_levels > 1:
        step = (noise.sigma_L / noise.sigma_1) ** (1 / ((noise.num_levels - 1) * sampler.refine))
        low, high = ((1 + sign * step) * noise.sigma_L**2 for sign in (-1, 1))
        if not low <= sampler.epsilon <= high:
            yield (
                f"sampling.sampler.epsilon = {sampler.epsilon:g} does not fit the noise levels; consistent annealed "
                f"sampling needs {low:.4g} to {high:.4g} for these noise.sigma_1, noise.sigma_L and noise.num_levels"
            )


def _splits(config: Config) -> Iterator[str]:
    if config.evaluation.num_splits > config.sampling.num_images:
        yield (
            f"sampling.num_images = {config.sampling.num_images} images do not fill evaluation.num_splits = "
            f"{config.evaluation.num_splits} splits; generate more images or lower evaluation.num_splits"
        )
