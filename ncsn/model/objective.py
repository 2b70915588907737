"""The objective of a training: its loss, and what a batch draws for it.

The next one is its settings in `ncsn.config.training` (what does not fit them is in its `rules`), its loss in
`ncsn.core`, and its case here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ncsn.config import Config
from ncsn.config.choices import ClassifierFreeConfig
from ncsn.config.training import ConsistencyLossConfig, DsmLossConfig, LognormalTraining, SsmLossConfig
from ncsn.core import losses
from ncsn.core.training_noise import FEW_DRAWS, LevelNoise, LognormalNoise, TrainingNoise
from ncsn.errors import UserError
from ncsn.model import build

if TYPE_CHECKING:
    from ncsn.core.consistency import PairSchedule


@dataclass(frozen=True)
class Objective:
    """What a training minimizes; see `objective_of`."""

    noise: TrainingNoise
    # With the `TrainState.uncertainty` that it learns, and the network of its teacher; each None if it has none.
    loss: Callable[[nn.Module | None, nn.Module | None], losses.Loss]
    weight: losses.Weight | None = None  # of the held-out loss at each sigma, but no learned one; None: no such loss
    edm_weight: losses.EdmWeight | None = None  # of the losses that compare with other trainings'; None: no such losses
    pairs: PairSchedule | None = None  # the second noise level of each image; None if it has one
    projects: bool = False  # whether each image has a random direction, `Batch.v`


def objective_of(config: Config) -> Objective:
    """The objective that the config names; it has noise levels."""
    loss, drawn = config.loss, config.noise.training
    sigma_data: Any = getattr(config.network, "sigma_data", None)  # a number where it is needed, by the config's rules
    edm = sigma_data and losses.EdmWeight(sigma_data)
    noise: TrainingNoise
    if isinstance(drawn, LognormalTraining):
        noise, compared = LognormalNoise(drawn.mean, drawn.std), edm
    else:  # the config chooses how the levels are distributed, so their mean says nothing to other trainings
        noise, compared = LevelNoise(build.sigmas(config)), None
    match loss:
        case DsmLossConfig():
            weight = losses.PowerWeight(loss.anneal_power) if loss.weighting == "power" else edm
            return Objective(noise, lambda u, _: losses.DenoisingScoreMatching(weight, u), weight, compared)
        case SsmLossConfig():
            # Imported here, as below, so that a run loads no loss but its own.
            from ncsn.core.sliced import SlicedScoreMatching

            sliced, weight = SlicedScoreMatching(loss.anneal_power), losses.PowerWeight(loss.anneal_power)
            return Objective(noise, lambda *_: sliced, weight, compared, projects=True)
        case ConsistencyLossConfig():
            from ncsn.core.consistency import ConsistencyTuning, PairSchedule, Teacher

            guidance = loss.guidance or ClassifierFreeConfig(kind="classifier_free", weight=1)
            band, dtype = (guidance.sigma_min, guidance.sigma_max), build.autocast_dtype(config)

            def tuned(_: nn.Module | None, network: nn.Module | None) -> losses.Loss:
                assert (network is not None) is loss.has_teacher
                teacher = None if network is None else Teacher(network, guidance.weight, band, dtype)
                return ConsistencyTuning(teacher, config.compute.compiled)

            # It has no held-out loss: that may rise towards the function that training looks for.
            return Objective(noise, tuned, pairs=PairSchedule(loss.q, loss.stages, config.train.num_images, sigma_data))


def require_teacher(own: Config, config: Config, *, kept: Sequence[int | None] | None) -> None:
    """Raise `UserError` if a network with the config `own` cannot teach one, whose classes it numbers `kept`."""
    loss, name = config.loss, config.train.init_from
    unknown = config.data.num_classes is not None and (own.data.num_classes is None or None in (kept or ()))
    if unknown or own.data.network_shape != config.data.network_shape:
        reason = f"cannot teach classes or colors that {name} does not have"
        raise UserError("loss.pairs", reason, hint="use image", value="teacher")
    if not own.loss.learns_score:
        raise UserError("loss.pairs", f"needs a score network, and {name} is none any more", value="teacher")
    if loss.guidance is not None and (own.data.num_classes is None or not own.train.label_dropout):
        reason = f"needs a network that was trained with data.num_classes and train.label_dropout; {name} was not"
        raise UserError("loss.guidance", reason, hint="use null")


# How far above the sigmas of training sampling may start: that of Karras et al. 2022, which works, is at 1.33 times.
_TOLERANCE = 1.35


def noise_notes(config: Config, *, images: int) -> list[str]:
    """A sentence if sampling starts far above the sigmas that a network trained on `images` images does not know.

    A network that another one started has seen more, and fewer than `FEW_DRAWS` images teach no sigma at all.
    """
    noise, sigma_1 = objective_of(config).noise, (config.sampling.levels or config.levels).sigma_1
    if not isinstance(noise, LognormalNoise) or config.train.init_from is not None or images < FEW_DRAWS:
        return []
    if sigma_1 <= _TOLERANCE * (seen := noise.largest_seen(images)):
        return []
    section = "sampling.levels" if config.sampling.levels else "noise"
    return [
        f"{section}.sigma_1 = {sigma_1:g} is beyond what the network sees in training: only about {FEW_DRAWS:,} of "
        f"{images:,} images have a sigma above {seen:.3g}"
    ]
