"""Rules across sections: settings that are valid alone but not together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from ncsn.config.choices import (
    ClassifierFreeConfig,
    DdpmppNetworkConfig,
    NcsnNetworkConfig,
    NcsnV2NetworkConfig,
    UnetNetworkConfig,
)
from ncsn.config.noise import AutoNoiseConfig, DsmLossConfig, LognormalTraining, SsmLossConfig
from ncsn.config.problems import problems
from ncsn.config.schema import Config
from ncsn.config.training import PowerEmaConfig
from ncsn.core.samplers.settings import AnnealedLangevin, DpmSolver, Langevin
from ncsn.errors import ConfigError, Problem

_HALVINGS = {"standard": 1, "deeper": 2, "deepest": 3}
_ANY_SIGMA = "needs a network that takes any sigma, but network.kind = ncsn knows only its own noise levels"


def checked(tree: dict[str, Any]) -> Config:
    """A validated `Config` from plain values, as of a YAML file; `ConfigError` with all problems."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError.of(problems(error, tree, model=Config)) from None
    if found := check(config):
        raise ConfigError.of(found)
    return config


def check(config: Config) -> list[Problem]:
    """A problem for each broken rule, with the key to change."""
    rules = (_images, _network_size, _noise, _training, _classes, _guidance, _sampling, _levels, _evaluation)
    return [problem for rule in rules for problem in rule(config)]


def _images(config: Config) -> Iterator[Problem]:
    data, network = config.data, config.network
    told = isinstance(network, UnetNetworkConfig | DdpmppNetworkConfig)
    given = {"data.num_classes": data.num_classes is not None, "data.augmentation": data.augmentation is not None}
    for key in (key for key, is_given in given.items() if is_given and not told):
        reason = f"needs a network that is told about it, but network.kind = {network.kind} is not"
        yield Problem(key, reason, "use network.kind = unet or ddpmpp, or null")
    if data.augmentation is not None and data.horizontal_flip:
        yield Problem(
            "data.horizontal_flip",
            "mirrors images without telling the network, but data.augmentation mirrors them and tells it",
            "use one of them",
            value=True,
        )


def _network_size(config: Config) -> Iterator[Problem]:
    network, size = config.network, config.data.image_size
    if isinstance(network, UnetNetworkConfig | DdpmppNetworkConfig):
        if isinstance(network, UnetNetworkConfig):
            key, given, halved, sizes = "widths", network.widths, "halved", [size]
            while len(sizes) < len(given):
                sizes.append((sizes[-1] + 1) // 2)
            most = sizes.index(1) + 1 if sizes[:-1].count(1) else len(sizes)
        else:
            key, given, halved = "multipliers", network.multipliers, "divided by 2"
            sizes, most = [size >> depth for depth in range(len(given))], (size & -size).bit_length()
        if len(sizes) > most:
            reason = f"too many: data.image_size = {size} can be {halved} only {most - 1} times"
            yield Problem(f"network.{key}", reason, f"use at most {most} {key}", list(given))
        elif missing := sorted(set(network.attention_sizes) - set(sizes)):
            yield Problem(
                "network.attention_sizes",
                f"no feature map has size {missing}; with data.image_size = {size} and {len(sizes)} resolutions they "
                f"have sizes {sizes}",
                "use some of these",
            )
    elif size % (step := 2 ** (_HALVINGS[network.depth] if isinstance(network, NcsnV2NetworkConfig) else 1)):
        yield Problem(
            "data.image_size",
            f"not divisible by {step}, which network.kind = {network.kind} needs",
            f"use {size - size % step} or {size + step - size % step}",
            size,
        )


def _noise(config: Config) -> Iterator[Problem]:
    loss, network = config.loss, config.network
    any_sigma = isinstance(config.noise.training, LognormalTraining)
    if any_sigma and isinstance(network, NcsnNetworkConfig):
        yield Problem("noise.training.kind", _ANY_SIGMA, "use levels, or another network.kind", "lognormal")
    if isinstance(loss, DsmLossConfig) and loss.weighting != "power" and not hasattr(network, "sigma_data"):
        yield Problem(
            "loss.weighting",
            f"needs network.sigma_data, which network.kind = {network.kind} does not have",
            "use power, or network.kind = unet",
            loss.weighting,
        )


def _training(config: Config) -> Iterator[Problem]:
    train, workers = config.train, config.compute.max_workers
    if train.batch_size < workers:
        reason = f"less than one image for each of compute.num_workers = {workers}"
        yield Problem("train.batch_size", reason, "raise it, or lower compute.num_workers", train.batch_size)
    if train.trainable == "light" and train.init_from is None:
        yield Problem(
            "train.trainable",
            "leaves convolutions as they are, and without train.init_from they are random",
            "set train.init_from, or use all",
            "light",
        )
    if config.compute.compile and isinstance(config.loss, SsmLossConfig):
        yield Problem(
            "compute.compile",
            "not possible with loss.kind = ssm, which differentiates the network twice",
            "use compute.compile = false",
            value=True,
        )


def _classes(config: Config) -> Iterator[Problem]:
    if config.data.num_classes is not None:
        return
    dropout, label = config.train.label_dropout, config.sampling.label
    if dropout:
        yield Problem("train.label_dropout", "needs classes", "set data.num_classes, or use 0", dropout)
    if label != "balanced":
        yield Problem(
            "sampling.label", "needs a class-conditional network", "set data.num_classes before training", label
        )


def _guidance(config: Config) -> Iterator[Problem]:
    if not isinstance(config.sampling.guidance, ClassifierFreeConfig):
        return
    key, kind, instead = "sampling.guidance.kind", "classifier_free", "before training, or use null or autoguidance"
    if config.data.num_classes is None:
        yield Problem(key, "needs a class-conditional network", f"set data.num_classes {instead}", kind)
    elif not config.train.label_dropout:
        reason = "with train.label_dropout = 0 the network has never seen an image without its class"
        yield Problem(key, reason, f"set it to 0.1 {instead}", kind)


def _sampling(config: Config) -> Iterator[Problem]:
    sampler, width, averaging = config.sampling.sampler, config.sampling.relative_width, config.train.averaging
    if width is not None and not isinstance(averaging, PowerEmaConfig):
        yield Problem(
            "sampling.relative_width",
            f"needs snapshots of two averages, which train.ema.kind = {averaging.kind} does not store",
            "use train.ema.kind = power, or null",
            width,
        )
    if sampler.any_sigma is not None and isinstance(config.network, NcsnNetworkConfig):
        setting, instead = sampler.any_sigma
        hint = f"use {instead}, or network.kind = ncsnv2, unet or ddpmpp"
        yield Problem(f"sampling.sampler.{setting}", _ANY_SIGMA, hint, getattr(sampler, setting))


def _levels(config: Config) -> Iterator[Problem]:
    """Of the noise levels that the sampler visits."""
    other, sampler, training = config.sampling.levels, config.sampling.sampler, config.noise.training
    key = "noise" if other is None else "sampling.levels"
    if other is not None and not isinstance(training, LognormalTraining):
        reason = f"needs a network trained at any sigma, but noise.training.kind = {training.kind}"
        yield Problem(key, reason, "use null, or train with lognormal")
    levels = other or config.noise
    if isinstance(levels, AutoNoiseConfig):
        return
    if levels.num_levels == 1 and sampler.several_levels:
        yield Problem(
            "sampling.sampler.kind",
            f"uses several noise levels, but {key}.num_levels = 1",
            "use sampling.sampler.kind = langevin",
            sampler.kind,
        )
    if isinstance(sampler, Langevin) and not -levels.num_levels <= sampler.level < levels.num_levels:
        yield Problem(
            "sampling.sampler.level",
            f"not one of {key}.num_levels = {levels.num_levels} levels",
            f"use 0 to {levels.num_levels - 1}, or -1 for the last",
            sampler.level,
        )
    if isinstance(sampler, AnnealedLangevin) and sampler.consistent and sampler.epsilon > levels.sigma_L**2:
        yield Problem(
            "sampling.sampler.epsilon",
            f"more than {key}.sigma_L^2 = {levels.sigma_L**2:g}, the maximum with sampling.sampler.consistent = true",
            "lower it",
            sampler.epsilon,
        )
    if isinstance(sampler, DpmSolver) and (sampler.num_levels or 0) > levels.num_levels:
        yield Problem(
            "sampling.sampler.num_levels",
            f"more than {key}.num_levels = {levels.num_levels}",
            "use fewer, or null for all",
            sampler.num_levels,
        )


def _evaluation(config: Config) -> Iterator[Problem]:
    evaluation, count = config.evaluation, config.sampling.num_images
    if evaluation.num_splits > count:
        yield Problem(
            "sampling.num_images",
            f"less than one for each of evaluation.num_splits = {evaluation.num_splits}",
            "raise it, or lower evaluation.num_splits",
            count,
        )
