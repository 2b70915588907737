"""Images from a trained network, as a caller wishes: the score is told their classes, and has guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn.config import Config
from ncsn.config.choices import AutoguidanceConfig
from ncsn.config.rules import checked
from ncsn.config.schema import MOST_IMAGES, SamplingConfig
from ncsn.core.images import to_stored
from ncsn.core.keyed_random import JoinedNoise, KeyedNoise, Stream, keyed_uniform
from ncsn.core.losses import ScoreFunction
from ncsn.core.networks.base import PreconditionedNetwork
from ncsn.core.networks.layers import FUSION
from ncsn.core.samplers.chain import sample, start, visited
from ncsn.core.samplers.langevin import Fields
from ncsn.core.samplers.settings import Sampler
from ncsn.errors import InvalidValue, UserError, shown_value
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork, load_checkpoint, weights_digest
from ncsn.model.classes import AS_DATA, BALANCED, require_label

CHECKPOINT = "sampling.guidance.checkpoint"
STRIP_IMAGES, STRIP_STAGES, STRIP_BYTES = 8, 12, 1_500_000


@dataclass(frozen=True)
class Wish:
    """Changes of `sampling` in the network's config; None leaves what stands there."""

    label: int | str | Mapping[str, int] | None = None  # of `sampling.label`
    guidance: float | None = None  # its weight; where none is configured, away from the images of all classes
    sampler: Sampler | Mapping[str, Any] | str | None = None  # or its settings, or its kind, with default settings
    seed: int | None = None

    def sampling(self, trained: TrainedNetwork) -> SamplingConfig:
        """The settings for a network; `UserError`, with keys as here, if it cannot follow them."""
        config = trained.config
        own, changes = config.sampling, dict[str, Any]()
        if isinstance(self.label, Mapping):
            changes["label"] = dict(self.label)
        elif self.label is not None or isinstance(own.label, dict):
            changes["label"] = BALANCED if self.label is None else str(self.label)
        if self.seed is not None:
            changes["seed"] = self.seed
        if self.sampler is not None and self.sampler != own.sampler.kind:
            changes["sampler"] = {"kind": self.sampler} if isinstance(self.sampler, str) else self.sampler
        if self.guidance is not None and own.guidance is not None:
            changes["guidance"] = {**dict(own.guidance), "weight": self.guidance}
        elif self.guidance not in (None, 1):
            changes["guidance"] = {"kind": "classifier_free", "weight": self.guidance}
        try:
            found = checked({**dict(config), "sampling": {**dict(own), **changes}}).sampling
            require_label(found.label, trained.classes)
        except UserError as error:
            raise error.reworded({"sampling.": "", "noise.num_levels = ": "the model's "}) from None
        return found


def images(trained: TrainedNetwork, count: int, wish: Wish) -> NDArray[Any]:
    """The first `count` images of a seed, [count, H, W, C] as stored; see `Wish.sampling` and `generate`."""
    sampling, device = wish.sampling(trained), next(trained.network.parameters()).device
    size = sampling.batch_size
    if isinstance(sampling.label, dict) and count > sampling.num_images:
        raise UserError("n", f"is more than the {sampling.num_images:,} images of the label", value=count)
    parts = [
        generate(trained, sampling=sampling, first=first, count=min(size, count - first), device=device)
        for first in range(0, count, size)
    ]
    return np.concatenate(parts)


def generate(
    trained: TrainedNetwork,
    *,
    sampling: SamplingConfig,
    first: int,
    count: int,
    device: str | torch.device = "cpu",
    on_level: Callable[[int, Tensor], None] | None = None,
    compiled: bool = False,
) -> NDArray[Any]:
    """Images `first .. first + count` of the seed as one batch, `[count, H, W, C]` as stored; see `generate_joined`."""
    parts = ranges_of(trained, sampling, first=first, count=count)
    return generate_joined(trained, parts, device=device, on_level=on_level, compiled=compiled)


class SeedRange(NamedTuple):
    """Images `first .. first + count` of the seed and label of these settings."""

    sampling: SamplingConfig
    first: int
    length: int


def ranges_of(trained: TrainedNetwork, sampling: SamplingConfig, *, first: int, count: int) -> list[SeedRange]:
    """Images `first .. first + count` of the settings; those asked for by class in ranges of one class each."""
    label, ranges, start = sampling.label, list[SeedRange](), 0
    if trained.classes is None or not isinstance(label, dict):
        return [SeedRange(sampling, first, count)]
    for name, asked in zip(trained.classes.names, trained.classes.counts_of(label), strict=True):
        low, high = max(first, start), min(first + count, start + asked)
        if low < high:
            own = sampling.model_copy(update={"label": {name: asked}})  # a class may be named `data`
            ranges.append(SeedRange(own, low - start, high - low))
        start += asked
    return ranges


def generate_joined(
    trained: TrainedNetwork,
    parts: Sequence[SeedRange],
    *,
    device: str | torch.device = "cpu",
    on_level: Callable[[int, Tensor], None] | None = None,
    compiled: bool = False,
) -> NDArray[Any]:
    """The images of all parts as one batch, `[N, H, W, C]` as stored; each is the same in any batch, up to rounding.

    Args:
        trained: Its network is on `device`.
        parts: Their settings differ in seed and label at most.
        on_level: Receives the number of each stage and the state as pixels around [0, 1]: 0 is the start, then one per
            visited level.
        compiled: Compile the network, which takes a minute or more for each `count`.

    Raises:
        UserError: An image is not finite.
    """
    sampling, config, shape = parts[0].sampling, trained.config, trained.config.data.network_shape
    sampler = build.sampler(config, sampling)
    # The start is made on the CPU, where products are exact.
    draws = [(own.seed, first + _offset(trained, own), length) for own, first, length in parts]
    at_start, in_chain = (
        JoinedNoise(tuple(KeyedNoise(seed, first=at, count=n, shape=shape, device=place) for seed, at, n in draws))
        for place in ("cpu", device)
    )
    known = [image_labels(trained, own, first=first, count=count) for own, first, count in parts]
    labels = torch.cat([each for each in known if each is not None]) if known[0] is not None else None
    score = score_function(trained, sampling, labels=labels, compiled=compiled)
    with torch.inference_mode():
        x = start(sampler, trained.moments, sigma_1=(sampling.levels or config.levels).sigma_1, noise=at_start)
        x = x.to(device, memory_format=_memory_format(trained))
        if on_level is not None:
            on_level(0, x)
        x = sample(
            sampler,
            score,
            x=x,
            sigmas=build.sigmas(config, sampling),
            noise=in_chain,
            on_level=None if on_level is None else lambda level, state: on_level(level + 1, state),
        )
    return level_images(x, sampling, config)


def _offset(trained: TrainedNetwork, sampling: SamplingConfig) -> int:
    """Where the noise of a class begins: from the same noise, images of two classes would be much alike."""
    if trained.classes is None or sampling.label in (BALANCED, AS_DATA):
        return 0
    (name,) = sampling.label if isinstance(sampling.label, dict) else (sampling.label,)
    return MOST_IMAGES * trained.classes.index(name, key="sampling.label")


def with_precision(sampling: SamplingConfig, trained: TrainedNetwork, device: str | torch.device) -> SamplingConfig:
    """The settings with the precision that `auto` stands for on a device."""
    if sampling.precision != "auto":
        return sampling
    half = torch.device(device).type == "cuda" and trained.config.train.precision == "bfloat16"
    return sampling.model_copy(update={"precision": "bfloat16" if half else "float32"})


def image_labels(trained: TrainedNetwork, sampling: SamplingConfig, *, first: int, count: int) -> Tensor | None:
    """Classes of images `first .. first + count` of the seed, int64 [count]; None for a network without classes.

    Balanced ones come in turn. Those as in the data are drawn in proportion to how often training saw each. Those asked
    for by class come class by class.
    """
    num_classes = trained.config.data.num_classes
    if num_classes is None:
        return None
    if sampling.label == BALANCED:
        return torch.arange(first, first + count) % num_classes
    assert trained.classes is not None
    if isinstance(sampling.label, dict):
        asked = torch.tensor(trained.classes.counts_of(sampling.label))
        return torch.arange(num_classes).repeat_interleave(asked)[first : first + count]
    if sampling.label == AS_DATA:
        ends = torch.tensor(trained.classes.counts, dtype=torch.float64).cumsum(0)
        u = keyed_uniform(sampling.seed, stream=Stream.LABEL_CHOICE, first=first, count=count, size=1)[:, 0]
        return torch.bucketize(u.double() * ends[-1], ends, right=True).clamp_(max=num_classes - 1)
    return torch.full((count,), trained.classes.index(sampling.label, key="sampling.label"))


def level_images(x: Tensor, sampling: SamplingConfig, config: Config) -> NDArray[Any]:
    """The images of a state, `[N, H, W, C]` as stored."""
    dequantized, pixels = sampling.grays == "exact" and config.data.dequantize, config.data.pixels
    try:
        stored = to_stored(x, dtype=pixels.dtype, limits=pixels.limits, dequantized=dequantized)
        images: NDArray[Any] = stored.cpu().numpy()
    except InvalidValue as error:
        hint = "lower its step size, or train longer"
        raise UserError("sampling.sampler", str(error), hint=hint, value=asdict(sampling.sampler)) from None
    return images


class Strip:
    """Takes the stages of images on their way from noise: an `on_level` of `generate`."""

    def __init__(self, sampling: SamplingConfig, config: Config) -> None:
        self._sampling, self._config = sampling, config
        self._stages: dict[int, Tensor] = {}  # at most `STRIP_STAGES`, evenly spread, and always the last
        self._every = 1
        values = math.prod(config.data.stored_shape)
        self._count = max(1, min(STRIP_IMAGES, STRIP_BYTES // (STRIP_STAGES * values)))

    def __call__(self, stage: int, x: Tensor) -> None:
        """Keep some images of this stage, perhaps until the next."""
        for number in [number for number in self._stages if number % self._every]:
            del self._stages[number]
        self._stages[stage] = x[: self._count].clone()
        if stage % self._every == 0 and len(self._stages) == STRIP_STAGES:  # how many more will come is not known
            self._every *= 2

    def frames(self, images: NDArray[Any]) -> NDArray[Any]:
        """The kept stages `[stages, N, H, W, C]`, of which the last is of the finished `images`."""
        last = max(self._stages, default=0)
        before = [level_images(x, self._sampling, self._config) for stage, x in self._stages.items() if stage != last]
        return np.stack([*before, images[: self._count]])


def _memory_format(trained: TrainedNetwork) -> torch.memory_format:
    """Of images and weights in sampling, where the network is."""
    on_gpu = next(trained.network.parameters()).is_cuda
    last = on_gpu and trained.config.compute.channels_last is not False
    return torch.channels_last if last else torch.contiguous_format


def _evaluated(trained: TrainedNetwork, *, bfloat16: bool, compiled: bool) -> ScoreFunction:
    """The network as samplers call it."""
    on_gpu = next(trained.network.parameters()).is_cuda
    network = trained.halved if bfloat16 and on_gpu else trained.network
    if (layout := _memory_format(trained)) is torch.channels_last:
        network.to(memory_format=layout)
    if compiled:
        network.compile(dynamic=False, options=FUSION if on_gpu else None)
    if not bfloat16:
        return network

    def score(x: Tensor, level: Tensor | None = None, **noise_and_conditions: Tensor | None) -> Tensor:
        # The network alone: what samplers do with its scores is exact.
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            result: Tensor = network(x, level, **noise_and_conditions)
        return result

    return score


def score_function(
    trained: TrainedNetwork, sampling: SamplingConfig, *, labels: Tensor | None, compiled: bool = False
) -> ScoreFunction | Fields:
    """The score function for images of these labels, int64 [B]; None without classes."""
    device = next(trained.network.parameters()).device
    bfloat16 = with_precision(sampling, trained, device).precision == "bfloat16"
    labels = None if labels is None else labels.to(device)
    levels, guidance = build.sigmas(trained.config, sampling), sampling.guidance
    network = _evaluated(trained, bfloat16=bfloat16, compiled=compiled)
    # Imported here, so that a run loads no guidance and no other levels that it does not use.
    if sampling.levels is not None:
        from ncsn.core.samplers.guidance import AtLevels

        network = AtLevels(network, levels.to(device))
    score = network if labels is None else partial(network, labels=labels)
    if guidance is None or guidance.weight == 1:
        return score
    from ncsn.core.samplers.guidance import AtLevels, Guided, band_on_grid

    worse = guide_of(trained, sampling)
    if worse is not None:
        # Its own levels may be others.
        guide = _evaluated(worse, bfloat16=bfloat16, compiled=compiled)
        if isinstance(worse.network, PreconditionedNetwork):
            guide = AtLevels(guide, levels.to(device))
        if labels is not None and worse.config.data.num_classes is not None:
            guide = partial(guide, labels=labels)
    else:
        assert labels is not None, "the config's rules"
        guide = partial(network, labels=torch.full_like(labels, -1))
    band = band_on_grid(
        guidance.sigma_min, guidance.sigma_max, visited(build.sampler(trained.config, sampling), levels)
    )
    return Guided(score, guide, weight=guidance.weight, band=band)


def evaluations_per_image(config: Config) -> int:
    """NFE of an image by the config's sampler, of both networks together under guidance."""
    guidance, sampler = config.sampling.guidance, build.sampler(config, config.sampling)
    levels = build.sigmas(config, config.sampling)
    whole = sampler.num_evaluations(len(levels))
    if guidance is None or guidance.weight == 1:
        return whole
    from ncsn.core.samplers.guidance import Guided, band_on_grid

    # Those of a chain whose scores are zero.
    band = band_on_grid(guidance.sigma_min, guidance.sigma_max, visited(sampler, levels))
    evaluations = 0

    def zero(x: Tensor, level: Tensor | None = None, *, sigma: Tensor | None = None) -> Tensor:  # noqa: ARG001
        nonlocal evaluations
        evaluations += 1
        return torch.zeros_like(x)

    nothing = torch.zeros(1, 1, 1, 1)
    guided = Guided(zero, zero, weight=guidance.weight, band=band)
    sample(sampler, guided, x=nothing, sigmas=levels, noise=lambda _: nothing)
    return evaluations


def packed_guide(trained: TrainedNetwork, sampling: SamplingConfig) -> TrainedNetwork | None:
    """The network of autoguidance that a registered model has with it; None for another one."""
    asked, own = (
        each.guidance.checkpoint if isinstance(each.guidance, AutoguidanceConfig) else None
        for each in (sampling, trained.config.sampling)
    )
    return trained.guide if asked == own else None


def guide_of(trained: TrainedNetwork, sampling: SamplingConfig) -> TrainedNetwork | None:
    """The worse network of autoguidance, at the URI of a checkpoint or packed; None for other settings."""
    guidance = sampling.guidance
    if not isinstance(guidance, AutoguidanceConfig):
        return None
    guide = packed_guide(trained, sampling)
    if guide is None:
        guide = _load(guidance.checkpoint, str(next(trained.network.parameters()).device))
    _require_fitting(trained, guide, guidance.checkpoint, sampling)
    return guide


def sampling_facts(sampling: SamplingConfig, guide: TrainedNetwork | None) -> dict[str, Any]:
    """What decides image i of a network's samples, as plain values; a guide by its weights, wherever they are."""
    chosen = {"sampler", "seed", "precision", "grays", "label", "guidance", "levels"}
    facts: dict[str, Any] = sampling.model_dump(mode="json", include=chosen)
    if guide is not None:
        facts["guidance"] = {**facts["guidance"], "checkpoint": weights_digest(guide.network)}
    return facts


@lru_cache(maxsize=1)
def _load(uri: str, device: str) -> TrainedNetwork:
    try:
        return load_checkpoint(uri, device=device)
    except UserError as error:
        raise UserError(CHECKPOINT, f"cannot be read: {error}", value=uri) from None


def _require_fitting(trained: TrainedNetwork, guide: TrainedNetwork, uri: str, sampling: SamplingConfig) -> None:
    """Refuse a guide for other images, other classes, or of other levels if it knows its own only."""
    one, other = trained.config.data, guide.config.data
    facts: list[tuple[str, object, object]] = [("pixels", str(one.pixels), str(other.pixels))]
    if trained.classes is not None and guide.classes is not None:
        facts.append(("classes", trained.classes.names, guide.classes.names))
    if not isinstance(guide.network, PreconditionedNetwork):
        facts.append(("noise", sampling.levels or trained.config.levels, guide.config.levels))
    for name, wanted, found in facts:
        if wanted != found:
            reason = f"its {name} is {shown_value(found)}, but the network's is {shown_value(wanted)}"
            raise UserError(CHECKPOINT, reason, value=uri)
