"""The sections `noise` and `loss`: the levels that samplers visit, the noise of training, and what it minimizes."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ncsn.config.choices import Section
from ncsn.errors import UserError


class LevelsTraining(Section):
    """Training at the noise levels that samplers visit, all equally often (paper, eq. 6)."""

    kind: Literal["levels"] = "levels"
    """The noise levels, all equally often."""


_EDM_MEAN, _EDM_SIGMA_DATA = -1.893147, 0.25  # of Karras et al. 2022: -1.2 and 0.5 for pixels in [-1, 1]


def edm_mean(sigma_data: float) -> float:
    """Mean of ln sigma that is to images of this spread what that of Karras et al. is to photographs."""
    return _EDM_MEAN + math.log(sigma_data / _EDM_SIGMA_DATA)


class LognormalTraining(Section):
    """Training at any sigma, ln sigma ~ N(mean, std^2) (Karras et al. 2022); the noise levels are for samplers only."""

    kind: Literal["lognormal"]
    """Any sigma; ln sigma is normally distributed."""
    mean: float = Field(_EDM_MEAN, ge=-15, le=10)
    """Mean of ln sigma, sigma in units of pixels in [0, 1]. The default is that of Karras et al. for photographs, -1.2
    in units of [-1, 1]; for other images add ln(network.sigma_data / 0.25)."""
    std: float = Field(1.2, gt=0, le=5)
    """Standard deviation of ln sigma."""


TrainingNoise = Annotated[LevelsTraining | LognormalTraining, Field(discriminator="kind")]
_TRAINING = Field(LevelsTraining(), description="The noise that training adds to its images.")


class LevelsConfig(Section):
    """Noise levels sigma_1 > ... > sigma_L, a geometric sequence."""

    sigma_1: float = Field(1.0, gt=0, le=1e4)
    """Largest noise standard deviation, in units of pixels in [0, 1]."""
    sigma_L: float = Field(0.01, gt=0, le=1e3)
    """Smallest noise standard deviation, same unit."""
    num_levels: int = Field(10, ge=1, le=10000)
    """Number of levels L. One level, with sigma_1 = sigma_L, means no annealing."""

    @model_validator(mode="after")
    def _descending(self) -> Self:
        if self.num_levels == 1 and self.sigma_1 != self.sigma_L:
            reason = f"num_levels = 1 needs sigma_1 = sigma_L, which is {self.sigma_L}"
            raise UserError("sigma_1", reason, value=self.sigma_1)
        if self.num_levels > 1 and self.sigma_1 <= self.sigma_L:
            reason = f"must be larger than sigma_L = {self.sigma_L}, since the levels go from most to least noise"
            raise UserError("sigma_1", reason, value=self.sigma_1)
        return self


class NoiseConfig(LevelsConfig):
    """The noise levels sigma_1 > ... > sigma_L, a geometric sequence (paper section 4.1)."""

    kind: Literal["geometric"] = "geometric"
    """Levels given by the other settings."""
    training: TrainingNoise = _TRAINING


class AutoNoiseConfig(Section):
    """Levels chosen from the training images when training starts (NCSNv2, techniques 1 and 2); `noise: auto`."""

    kind: Literal["auto"]
    """sigma_1 is the largest distance between two images."""
    sigma_L: float = Field(0.01, gt=0, le=1e3)
    """Smallest noise standard deviation, in units of pixels in [0, 1]."""
    training: TrainingNoise = _TRAINING


NoiseChoice = Annotated[NoiseConfig | AutoNoiseConfig, Field(discriminator="kind")]

_ANNEAL_POWER = Field(2.0, ge=0, le=4, description="The weight at sigma is sigma ** anneal_power; the paper uses 2.")


class DsmLossConfig(Section):
    """Denoising score matching (paper eq. 5 and 6)."""

    kind: Literal["dsm"] = "dsm"
    """The loss of the 2019 paper."""
    weighting: Literal["power", "edm", "learned"] = "power"
    """Weight of the loss at sigma: power = sigma ** anneal_power; edm = sigma^2 + sigma^4 / network.sigma_data^2
    (Karras et al. 2022); learned = edm divided by the loss that a linear layer learns to predict (Karras et al. 2024).
    """
    anneal_power: float = _ANNEAL_POWER


class SsmLossConfig(Section):
    """Sliced score matching with variance reduction (paper eq. 3), at each noise level."""

    kind: Literal["ssm"]
    """Does not need to know the noise; costs two to four times as much as dsm."""
    anneal_power: float = _ANNEAL_POWER


LossConfig = Annotated[DsmLossConfig | SsmLossConfig, Field(discriminator="kind")]
