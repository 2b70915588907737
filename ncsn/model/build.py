"""Build the objects that a `Config` names."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import assert_never

import torch
from torch import Tensor, nn

from ncsn.config import Config
from ncsn.config.choices import (
    DdpmppNetworkConfig,
    DsmLossConfig,
    NcsnNetworkConfig,
    NcsnV2NetworkConfig,
    SingleSigmaLossConfig,
    SsmLossConfig,
    UnetNetworkConfig,
)
from ncsn.config.samplers import SamplerConfig, parse_sampler
from ncsn.config.schema import DataConfig
from ncsn.core.images import PixelSpace
from ncsn.core.losses import DenoisingScoreMatching, Loss, SingleSigma, SlicedScoreMatching
from ncsn.core.networks.ddpmpp import DdpmppNetwork
from ncsn.core.networks.refinenet import NcsnNetwork, NcsnV2Network
from ncsn.core.networks.unet import UnetNetwork
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.base import Sampler
from ncsn.core.samplers.multistep import DpmSolver, UniPC
from ncsn.core.samplers.ode import KarrasHeun, ProbabilityFlow
from ncsn.core.samplers.stochastic import AnnealedLangevin, ConsistentAnnealed, Langevin, PredictorCorrector
from ncsn.core.training import Ema, StepOptions, TrainState
from ncsn.errors import UserError

_SAMPLERS: dict[str, type[Sampler]] = {
    each.kind: each
    for each in (
        AnnealedLangevin,
        Langevin,
        ConsistentAnnealed,
        PredictorCorrector,
        ProbabilityFlow,
        KarrasHeun,
        DpmSolver,
        UniPC,
    )
}


def pixel_space(data: DataConfig) -> PixelSpace:
    """The space in which the network sees the images."""
    return PixelSpace(dequantized=data.dequantize, logit=data.logit_transform)


def sigmas(config: Config) -> Tensor:
    """The noise levels, `[num_levels]` float32, descending."""
    levels = config.levels
    return geometric_sigmas(levels.sigma_1, levels.sigma_L, levels.num_levels)


def network(config: Config) -> nn.Module:
    """The score network with its initial weights, which `config.seed` alone decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if isinstance(config.network, NcsnNetworkConfig):
            return NcsnNetwork(
                num_features=config.network.num_features,
                channels=config.data.channels,
                num_levels=config.levels.num_levels,
                rescale=not config.data.logit_transform,
            )
        if isinstance(config.network, NcsnV2NetworkConfig):
            return NcsnV2Network(
                config.network.num_features,
                channels=config.data.channels,
                sigmas=sigmas(config),
                depth=config.network.depth,
                rescale=not config.data.logit_transform,
            )
        if isinstance(config.network, UnetNetworkConfig | DdpmppNetworkConfig):
            kind = UnetNetwork if isinstance(config.network, UnetNetworkConfig) else DdpmppNetwork
            return kind(
                channels=config.data.channels,
                image_size=config.data.image_size,
                sigmas=sigmas(config),
                **config.network.model_dump(exclude={"kind"}),
            )
        assert_never(config.network)


def sampler(settings: SamplerConfig) -> Sampler:
    """The sampler, ready to run on any network."""
    return _SAMPLERS[settings.kind](**settings.model_dump(exclude={"kind"}))


def sampler_section(sampler: Sampler) -> SamplerConfig:
    """The config section of a sampler."""
    return parse_sampler({"kind": sampler.kind, **asdict(sampler)})


def loss(config: Config) -> Loss:
    """The training loss."""
    settings = config.loss
    if isinstance(settings, DsmLossConfig):
        return DenoisingScoreMatching(anneal_power=settings.anneal_power, antithetic=settings.antithetic)
    if isinstance(settings, SsmLossConfig):
        return SlicedScoreMatching(anneal_power=settings.anneal_power, num_projections=settings.num_projections)
    if isinstance(settings, SingleSigmaLossConfig):
        return SingleSigma()
    assert_never(settings)


def step_options(config: Config, *, device: str | torch.device, world_size: int) -> StepOptions:
    """Options of a training step on `device`, for one of `world_size` workers."""
    return StepOptions(
        grad_clip_norm=config.optimizer.grad_clip_norm,
        autocast_dtype=autocast_dtype(config, device),
        microbatch=config.compute.microbatch,
        mean_share=config.train.batch_size / world_size,
    )


def optimizer(config: Config, network: nn.Module) -> torch.optim.Adam:
    """Adam over all parameters, in their order of registration."""
    settings = config.optimizer
    return torch.optim.Adam(
        network.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta_1, settings.beta_2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def memory_format(config: Config) -> torch.memory_format:
    """Memory format of images and convolutions."""
    return torch.channels_last if config.compute.channels_last else torch.contiguous_format


def autocast_dtype(config: Config, device: str | torch.device) -> torch.dtype | None:
    """Type of the convolutions in training, or None for that of the weights.

    Raises:
        UserError: if `device` cannot train in it.
    """
    precision = config.train.precision
    if precision == "float16" and torch.device(device).type == "cpu":
        raise UserError(
            "train.precision",
            "trains on GPUs only",
            hint="set compute.use_gpu = true, or use bfloat16 or float32",
            value="float16",
        )
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def train_state(config: Config, *, device: str | torch.device = "cpu") -> TrainState:
    """Network, optimizer and EMA weights at the start of training."""
    score_network = network(config).to(device)
    score_network.to(memory_format=memory_format(config))
    # A CPU, which cannot train in float16, only imports checkpoints, which have no scaler.
    scaled = config.train.precision == "float16" and torch.device(device).type != "cpu"
    return TrainState(
        network=score_network,
        optimizer=optimizer(config, score_network),
        ema=Ema(score_network, decay=config.train.ema_decay),
        scaler=torch.amp.GradScaler(torch.device(device).type) if scaled else None,
    )


def learning_rate(config: Config, images_seen: int) -> float:
    """The rate of the batch that starts at `images_seen`: linear warmup times the chosen decay."""
    settings, batch = config.optimizer, config.train.batch_size
    done = (images_seen + batch) / max(settings.warmup_images, 1)
    warmup = min(1.0, done) if settings.warmup_images else 1.0
    left = max(0.0, 1.0 - images_seen / config.train.num_images)
    fall = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[settings.decay]
    return settings.learning_rate * warmup * fall
