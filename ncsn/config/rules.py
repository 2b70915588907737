"""Settings that are valid alone but not together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from ncsn.config.choices import ClassifierFreeConfig, NcsnNetworkConfig, UnetNetworkConfig
from ncsn.config.problems import leaves, problems
from ncsn.config.schema import MOST_IMAGES, Config
from ncsn.config.training import ConsistencyLossConfig, LevelsConfig, LognormalTraining
from ncsn.core.samplers.settings import AnnealedLangevin, Consistency, DpmSolver, Langevin
from ncsn.errors import ConfigError, Problem, UserError

_WEIGHTS = {"inception": "weights-inception-2015-12-05-6726825d.pth", "dinov2": "dinov2_vitl14_pretrain.pth"}  # files
# Or a token, which is a user without one.
_PASSWORD = re.compile(r"^https?://[^/\s]*@|://[^/\s]*:[^/\s]*@|://.*[?&][^=]*(password|token|signature)=", re.I)
_ANY_SIGMA = "needs a network that takes any sigma, but network.kind = ncsn knows only its own noise levels"


def checked(tree: dict[str, Any]) -> Config:
    """A validated `Config` from plain values, as of a YAML file; `ConfigError` with all problems."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError.of(problems(error, tree, model=Config)) from None
    if found := [problem for rule in _RULES for problem in rule(config)]:
        raise ConfigError.of(found)
    return config


def require_splits(config: Config) -> None:
    """Refuse fewer images than the evaluation splits them into; who only samples may ask for any number."""
    count, splits = config.sampling.num_images, config.evaluation.num_splits
    if count < splits:
        reason, hint = f"less than one for each of evaluation.num_splits = {splits}", "raise it, or lower that"
        raise UserError("sampling.num_images", reason, hint=hint, value=count)


def _addresses(config: Config) -> Iterator[Problem]:
    """Of all addresses."""
    for path, value in leaves(config):
        if isinstance(value, str) and _PASSWORD.search(value):
            reason, hint = "contains a password, and every run records the config", "give it without"
            hint = "set MLFLOW_TRACKING_URI instead" if path == "tracking.uri" else hint
            yield Problem(path, reason, hint, value)


def _network(config: Config) -> Iterator[Problem]:
    """Of the images and the network that takes them."""
    data, network = config.data, config.network
    *sides, _ = data.stored_shape
    size, given_size = min(sides), data.image_size if isinstance(data.image_size, int) else sides
    given = {"data.num_classes": data.num_classes is not None, "data.augmentation": data.augmentation is not None}
    for key in (key for key, is_given in given.items() if is_given and isinstance(network, NcsnNetworkConfig)):
        reason = "needs a network that is told about it, but network.kind = ncsn is not"
        yield Problem(key, reason, "use network.kind = unet or ddpmpp, or null")
    if data.augmentation is not None and data.horizontal_flip:
        reason = "mirrors images without telling the network, but data.augmentation mirrors them and tells it"
        yield Problem("data.horizontal_flip", reason, "use one of them", value=True)
    if data.crop is not None and data.fit != "crop":
        yield Problem("data.crop", f"needs data.fit = crop, not {data.fit}", "leave one of them out", data.crop)
    if data.leave_out and data.source != "image_folder":
        yield Problem("data.leave_out", "needs data.source = image_folder", "leave it out", list(data.leave_out))
    own = data.source in ("image_folder", "parquet")
    if not own and (data.dtype != "uint8" or data.channels not in (1, 3)):
        reason = f"has gray and color images of 8 bits, not {data.channels} channels of {data.dtype}"
        yield Problem("data.source", reason, "use image_folder or parquet", data.source)
    if data.value_range is not None:
        low, high = data.value_range
        whole = low.is_integer() and high.is_integer() and low >= 0 and high <= 65535
        if data.dtype == "uint8":
            yield Problem("data.value_range", "needs data.dtype = uint16 or float32", "use null", [low, high])
        elif low >= high or (data.dtype == "uint16" and not whole):
            needed = "two whole numbers from 0 to 65535, " if data.dtype == "uint16" else ""
            yield Problem("data.value_range", f"is not {needed}[low, high] with low < high", value=[low, high])
    if isinstance(network, NcsnNetworkConfig):
        if math.gcd(*sides) % 2:
            reason = "not divisible by 2, which network.kind = ncsn needs"
            yield Problem("data.image_size", reason, f"use {_nearest(sides, 2)}", given_size)
        return
    if isinstance(network, UnetNetworkConfig):
        key, widths, halved, sizes = "widths", network.widths, "halved", [size]
        while len(sizes) < len(widths):
            sizes.append((sizes[-1] + 1) // 2)
        most = sizes.index(1) + 1 if sizes[:-1].count(1) else len(sizes)
        hint = f"use at most {most} {key}"
    else:
        key, widths, halved = "multipliers", network.multipliers, "divided by 2"
        sizes = [size >> depth for depth in range(len(widths))]
        most = (math.gcd(*sides) & -math.gcd(*sides)).bit_length()
        hint = f"use at most {most} {key}, or data.image_size = {_nearest(sides, 2 ** (len(widths) - 1))}"
    if len(sizes) > most:
        reason = f"too many: data.image_size = {given_size} can be {halved} only {most - 1} times"
        yield Problem(f"network.{key}", reason, hint, list(widths))
    elif missing := sorted(set(network.attention_sizes) - set(sizes)):
        reason = f"no feature map has size {missing}; with data.image_size = {given_size} they have sizes {sizes}"
        yield Problem("network.attention_sizes", reason, "use some of these")


def _nearest(sides: Sequence[int], step: int) -> str:
    """The sizes of images nearest to these sides, below and above, of which `step` divides both sides."""
    found = [[max(step, side // step * step) for side in sides], [-(-side // step) * step for side in sides]]
    return " or ".join(dict.fromkeys(str(size[0] if size[0] == size[1] else size) for size in found))


def _training(config: Config) -> Iterator[Problem]:
    """Of the noise, the loss and the length of training, and of its workers."""
    loss, network, train, compute = config.loss, config.network, config.train, config.compute
    workers = compute.max_workers
    if isinstance(config.noise.training, LognormalTraining) and isinstance(network, NcsnNetworkConfig):
        yield Problem("noise.training.kind", _ANY_SIGMA, "use levels, or another network.kind", "lognormal")
    if loss.weighting in ("edm", "learned") and isinstance(network, NcsnNetworkConfig):
        reason = "needs network.sigma_data, which network.kind = ncsn does not have"
        yield Problem("loss.weighting", reason, "use power, or network.kind = unet", loss.weighting)
    if train.num_images < train.batch_size:
        reason = f"less than one batch: train.batch_size = {train.batch_size}"
        yield Problem("train.num_images", reason, "raise it", train.num_images)
    decay, images = config.optimizer.decay, config.optimizer.decay_images
    if images is not None and decay != "linear":
        reason = f"needs optimizer.decay = linear, not {decay}"
        yield Problem("optimizer.decay_images", reason, "leave one of them out", images)
    elif images is not None and images > train.num_images:
        reason = f"more than train.num_images = {train.num_images:,}"
        yield Problem("optimizer.decay_images", reason, "lower it", images)
    if train.batch_size < workers:
        reason = f"less than one image for each of compute.num_workers = {workers}"
        yield Problem("train.batch_size", reason, "raise it, or lower compute.num_workers", train.batch_size)
    if train.trainable == "light" and train.init_from is None:
        reason = "leaves convolutions as they are, and without train.init_from they are random"
        yield Problem("train.trainable", reason, "set train.init_from, or use all", "light")
    if train.continue_from is not None and config.search is not None:
        yield Problem("train.continue_from", "does not fit a search", "leave one of them out", train.continue_from)
    if compute.compile is True and loss.differentiates_twice:
        reason = f"not possible with loss.kind = {loss.kind}, which differentiates the network twice"
        yield Problem("compute.compile", reason, "use compute.compile = auto", value=True)
    size = compute.kuberay.workers_per_pod
    if compute.backend == "kuberay" and (odd := [count for count in (compute.min_workers, workers) if count % size]):
        reason = f"{odd[0]} workers with compute.kuberay.workers_per_pod = {size} would be {odd[0] / size:g} pods"
        hint = f"use a multiple of {size}, or set compute.kuberay.workers_per_pod to a divisor of {odd[0]}"
        given = compute.num_workers if isinstance(compute.num_workers, int) else list(compute.num_workers)
        yield Problem("compute.num_workers", reason, hint, given)


def _classes(config: Config) -> Iterator[Problem]:
    """Of classes and guidance by them."""
    dropout, label, guidance = config.train.label_dropout, config.sampling.label, config.sampling.guidance
    has_classes = config.data.num_classes is not None
    if dropout and not has_classes:
        yield Problem("train.label_dropout", "needs classes", "set data.num_classes, or use 0", dropout)
    if config.utility is not None and (config.data.num_classes or 0) < 2:
        reason, hint = "needs a network that is told two classes or more", "set data.num_classes, or use null"
        yield Problem("utility", reason, hint)
    if config.tracking.require.utility_above is not None and config.utility is None:
        yield Problem("tracking.require.utility_above", "needs the section utility", "add it, or use null")
    if label != "balanced" and not has_classes:
        reason, hint = "needs a class-conditional network", "set data.num_classes before training"
        yield Problem("sampling.label", reason, hint, label)
    if isinstance(label, dict) and config.sampling.num_images > MOST_IMAGES:
        yield Problem("sampling.label", f"asks for more than {MOST_IMAGES:,} images", "lower it", label)
    if config.export.fill and config.export.per_class:
        reason = "says another number than export.fill, which completes each class to the largest"
        yield Problem("export.per_class", reason, "leave one of them out", config.export.per_class)
    if isinstance(guidance, ClassifierFreeConfig):
        key, instead = "sampling.guidance.kind", "before training, or use null or autoguidance"
        if not has_classes:
            reason = "needs a class-conditional network"
            yield Problem(key, reason, f"set data.num_classes {instead}", guidance.kind)
        elif not dropout:
            reason = "with train.label_dropout = 0 the network has never seen an image without its class"
            yield Problem(key, reason, f"set it to 0.1 {instead}", guidance.kind)
    if guidance is not None and guidance.sigma_min >= guidance.sigma_max:
        reason = f"must be below sampling.guidance.sigma_max = {guidance.sigma_max:g}"
        yield Problem("sampling.guidance.sigma_min", reason, value=guidance.sigma_min)


def _sampling(config: Config) -> Iterator[Problem]:
    """Of the sampler, and of the evaluation of its images."""
    sampling, evaluation = config.sampling, config.evaluation
    sampler, training = sampling.sampler, config.noise.training
    if sampler.any_sigma is not None and isinstance(config.network, NcsnNetworkConfig):
        setting, instead = sampler.any_sigma
        hint = f"use {instead}, or network.kind = unet or ddpmpp"
        yield Problem(f"sampling.sampler.{setting}", _ANY_SIGMA, hint, getattr(sampler, setting))
    if sampling.levels is not None and not isinstance(training, LognormalTraining):
        reason = f"needs a network trained at any sigma, but noise.training.kind = {training.kind}"
        yield Problem("sampling.levels", reason, "use null, or train with lognormal")
    if evaluation.pretrained is not None and config.data.channels not in (1, 3):
        reason = f"needs gray or RGB images, but data.channels = {config.data.channels}"
        yield Problem("evaluation.extractor", reason, "use classifier or clusters", evaluation.pretrained)
    elif evaluation.pretrained is not None and evaluation.weights is None:
        reason = f"missing, and evaluation.extractor = {evaluation.pretrained} needs them; there is no default download"
        hint = f"set it to the path, URL or S3 URI of {_WEIGHTS[evaluation.pretrained]}"
        yield Problem("evaluation.weights", reason, hint)


def _levels(config: Config) -> Iterator[Problem]:
    """Of the noise levels, and of the sampler at those that it visits."""
    sampler, visited = config.sampling.sampler, config.sampling.levels or config.noise
    for key, levels in (("noise", config.noise), ("sampling.levels", config.sampling.levels)):
        if not isinstance(levels, LevelsConfig):
            continue
        number, reason = levels.num_levels, ""
        if number == 1 and levels.sigma_1 != levels.sigma_L:
            reason = f"{key}.num_levels = 1 needs sigma_1 = sigma_L, which is {levels.sigma_L}"
        elif number > 1 and levels.sigma_1 <= levels.sigma_L:
            reason = f"must be larger than sigma_L = {levels.sigma_L}, since the levels go from most to least noise"
        if reason:
            yield Problem(f"{key}.sigma_1", reason, value=levels.sigma_1)
        elif levels is not visited:
            continue
        elif number == 1 and sampler.several_levels:
            reason = f"uses several noise levels, but {key}.num_levels = 1"
            yield Problem("sampling.sampler.kind", reason, "use sampling.sampler.kind = langevin", sampler.kind)
        elif isinstance(sampler, Langevin) and not -number <= sampler.level < number:
            hint = f"use 0 to {number - 1}, or -1 for the last"
            reason = f"not one of {key}.num_levels = {number} levels"
            yield Problem("sampling.sampler.level", reason, hint, sampler.level)
        elif isinstance(sampler, AnnealedLangevin) and sampler.consistent and sampler.epsilon > levels.sigma_L**2:
            most = f"{key}.sigma_L^2 = {levels.sigma_L**2:g}, the maximum with sampling.sampler.consistent = true"
            yield Problem("sampling.sampler.epsilon", f"more than {most}", "lower it", sampler.epsilon)
        elif isinstance(sampler, DpmSolver) and (sampler.num_levels or 0) > number:
            reason, hint = f"more than {key}.num_levels = {number}", "use fewer, or null for all"
            yield Problem("sampling.sampler.num_levels", reason, hint, sampler.num_levels)


_MOST_POWER = 2**14  # then t - r, about t / 2^14, has half the digits of float32


def _consistency(config: Config) -> Iterator[Problem]:
    """Of a loss and a sampler that are for each other, and for networks that are told the spread of the images."""
    loss, network, sampler = config.loss, config.network, config.sampling.sampler
    noise, train = config.noise, config.train
    if not isinstance(loss, ConsistencyLossConfig):
        if isinstance(sampler, Consistency):
            reason = f"needs a network that loss.kind = consistency has tuned, not {loss.kind}"
            yield Problem("sampling.sampler.kind", reason, "use karras_heun", sampler.kind)
        return
    if not isinstance(sampler, Consistency):
        reason = "does not fit a network of loss.kind = consistency, which is no score network any more"
        yield Problem("sampling.sampler.kind", reason, "use consistency", sampler.kind)
    if config.sampling.guidance is not None:
        reason = "does not fit a network of loss.kind = consistency, which has learned what it makes of noise"
        yield Problem("sampling.guidance", reason, "use null here, and loss.guidance")
    if (power := loss.q**loss.stages) > _MOST_POWER:
        reason = f"q^stages = {power:.4g}, and above {_MOST_POWER} the levels of a pair are equal but for rounding"
        yield Problem("loss.stages", reason, "use 8 with q = 2, or 1 with q = 256", loss.stages)
    if isinstance(network, NcsnNetworkConfig):
        reason = "needs network.sigma_data, which network.kind = ncsn does not have"
        yield Problem("loss.kind", reason, "use network.kind = unet or ddpmpp", loss.kind)
    if not isinstance(noise.training, LognormalTraining):
        reason = f"needs pairs of any noise, but noise.training.kind = {noise.training.kind}"
        yield Problem("loss.kind", reason, "use noise.training.kind = lognormal", loss.kind)
    if (train.init_from is None) is not loss.from_scratch:
        reason = "must be set, or loss.from_scratch = true, and not both"
        hint = "name the run, model or checkpoint to tune"
        yield Problem("train.init_from", reason, hint, train.init_from)
    if loss.pairs == "teacher" and train.init_from is None:
        yield Problem("loss.pairs", "needs the network of train.init_from", "set it, or use image", loss.pairs)
    if loss.guidance is not None and (config.data.num_classes is None or loss.pairs != "teacher"):
        reason = "needs a teacher that knows classes"
        yield Problem("loss.guidance", reason, "set data.num_classes and loss.pairs = teacher, or use null")
    elif loss.guidance is not None and not loss.guidance.sigma_min < loss.guidance.sigma_max:
        reason = f"must be below sigma_max = {loss.guidance.sigma_max:g}"
        yield Problem("loss.guidance.sigma_min", reason, value=loss.guidance.sigma_min)
    if isinstance(network, NcsnNetworkConfig) or not isinstance(sampler, Consistency):
        return
    levels, given = config.sampling.levels or noise, sampler.placed(network.sigma_data)
    if isinstance(levels, LevelsConfig) and given and not levels.sigma_1 > max(given):
        reason = f"has {max(given):.4g}, which is not below sigma_1 = {levels.sigma_1:g}, where sampling starts"
        yield Problem("sampling.sampler.sigmas", reason, "raise sigma_1, or set smaller numbers", sampler.sigmas)


_RULES = (_addresses, _network, _training, _classes, _sampling, _levels, _consistency)
