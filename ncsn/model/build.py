"""Build the objects that a `Config` names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from ncsn.config import Config
from ncsn.config.choices import DdpmppNetworkConfig, UnetNetworkConfig
from ncsn.config.schema import SamplingConfig
from ncsn.config.training import HalfLifeEmaConfig
from ncsn.core.ema import Ema, half_life, step_decay
from ncsn.core.networks.layers import narrowed
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.settings import AnySampler, Consistency
from ncsn.core.training import Muon, StepOptions, TrainState


def sigmas(config: Config, sampling: SamplingConfig | None = None) -> Tensor:
    """The noise levels, or those that a sampler with these settings visits, `[num_levels]` float32, descending."""
    levels = (sampling and sampling.levels) or config.levels
    return geometric_sigmas(levels.sigma_1, levels.sigma_L, levels.num_levels)


def sampler(config: Config, sampling: SamplingConfig) -> AnySampler:
    """The sampler of these settings, with numbers where they leave them to the images."""
    found = sampling.sampler
    if not isinstance(found, Consistency):
        return found
    assert isinstance(config.network, UnetNetworkConfig | DdpmppNetworkConfig), "the config's rules"
    return replace(found, sigmas=found.placed(config.network.sigma_data))


def network(config: Config) -> nn.Module:
    """The score network with its initial weights, which `config.seed` alone decides."""
    # The imports are here, so that a run loads its own network and no other.
    channels, own = config.data.channels, config.network.model_dump(exclude={"kind"})
    # Of the kinds with preconditioning.
    conditioned: dict[str, Any] = {
        "channels": channels,
        "image_size": min(config.data.stored_shape[:2]),
        "num_classes": config.data.num_classes,
        "augmentation": config.data.augmentation is not None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        match config.network.kind:
            case "ncsn":
                from ncsn.core.networks.refinenet import NcsnNetwork

                return NcsnNetwork(channels=channels, num_levels=config.levels.num_levels, **own)
            case "unet":
                from ncsn.core.networks.unet import UnetNetwork

                return UnetNetwork(sigmas=sigmas(config), **conditioned, **own)
            case "ddpmpp":
                from ncsn.core.networks.ddpmpp import DdpmppNetwork

                return DdpmppNetwork(sigmas=sigmas(config), **conditioned, **own)
            case kind:
                assert_never(kind)


def frozen(network: nn.Module, config: Config) -> nn.Module:
    """The network as a teacher, in eval mode; on a GPU with weights in the precision of training."""
    dtype = autocast_dtype(config)
    if dtype is not None and next(network.parameters()).is_cuda:  # autocast would cast them in each pass
        for layer in narrowed(network).values():
            layer.to(dtype)
    return network.eval().requires_grad_(requires_grad=False)


def autocast_dtype(config: Config) -> torch.dtype | None:
    """Of the network's convolutions in training; None for that of the parameters."""
    return torch.bfloat16 if config.train.precision == "bfloat16" else None


def step_options(config: Config, *, world_size: int) -> StepOptions:
    """Options of a training step for one of `world_size` workers."""
    return StepOptions(
        grad_clip_norm=config.optimizer.grad_clip_norm,
        autocast_dtype=autocast_dtype(config),
        microbatch=config.compute.microbatch,
        batch_size=config.train.batch_size,
        world_size=world_size,
    )


def memory_format(config: Config) -> torch.memory_format:
    compute = config.compute
    last = compute.use_gpu if compute.channels_last == "auto" else compute.channels_last
    return torch.channels_last if last else torch.contiguous_format


def tune_cuda(device: str | torch.device) -> None:
    """If it is a GPU, let it try which convolutions are fastest, and use TF32 for what stays in float32.

    For each process that trains, samples or extracts features; what must be exact is on the CPU, or in `full_float32`.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.benchmark = True
        # PyTorch's default for convolutions. With its new setting alone, fp32_precision, parts of Inductor fail.
        torch.backends.cuda.matmul.allow_tf32 = True


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with this number of threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def without_search() -> Iterator[None]:
    """For shapes that come seldom: cuDNN would try all its convolutions on each before their first use."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def train_state(config: Config, *, device: str | torch.device = "cpu") -> TrainState:
    """Everything that training changes, at its start."""
    score_network = network(config).to(device)
    score_network.to(memory_format=memory_format(config))
    if config.train.trainable == "light":
        from ncsn.core.networks.transfer import light_parameters

        light = light_parameters(score_network)
        for name, parameter in score_network.named_parameters():
            parameter.requires_grad_(name in light)
    uncertainty = None
    if config.loss.weighting == "learned":
        from ncsn.core.uncertainty import Uncertainty

        uncertainty = Uncertainty(seed=config.seed).to(device)
    return TrainState(
        network=score_network,
        optimizer=optimizer(config, score_network, uncertainty),
        ema=new_ema(config, score_network),
        uncertainty=uncertainty,
    )


def optimizer(config: Config, network: nn.Module, uncertainty: nn.Module | None) -> torch.optim.Optimizer:
    """The optimizer of all parameters, whose groups have their peak rate as `initial_lr`."""
    trained = [*network.parameters(), *(uncertainty.parameters() if uncertainty else ())]
    rate, muon = config.optimizer.learning_rate, config.optimizer.muon

    def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": parameters, "initial_lr": rate}], lr=rate, fused=True)

    if muon is None:
        return adam(trained)
    layers: Any = network.image_layers
    of_images = {network.get_parameter(f"{layer}.weight") for layer in layers}
    hidden = [each for each in trained if each.ndim == 4 and each not in of_images]
    known = set(hidden)
    others = adam([each for each in trained if each not in known])
    return Muon(hidden, others, learning_rate=muon.learning_rate)


def new_ema(config: Config, network: nn.Module) -> Ema:
    """The EMA, which starts from these weights."""
    settings = config.train.averaging
    if isinstance(settings, HalfLifeEmaConfig):
        return Ema(network, half_life(settings.images, settings.ramp_up))
    return Ema(network, step_decay(settings.per_step))


def learning_rate(config: Config, images_seen: int, *, peak: float | None = None) -> float:
    """The rate of the batch that starts at `images_seen`: linear warmup times the chosen decay.

    `peak` replaces `optimizer.learning_rate`.
    """
    settings, batch = config.optimizer, config.train.batch_size
    done = (images_seen + batch) / max(settings.warmup_images, 1)
    warmup = min(1.0, done) if settings.warmup_images else 1.0
    length, fall = config.train.num_images, 1.0
    if settings.decay == "cosine":
        fall = 0.5 + 0.5 * math.cos(math.pi * min(1.0, images_seen / length))
    elif settings.decay == "linear":
        fall = min(1.0, max(0, length - images_seen) / (settings.decay_images or length / 3))
    return (peak or settings.learning_rate) * warmup * fall
