"""The losses that `loss.kind` can choose, each with its own settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ncsn.config.section import Section

_ANNEAL_POWER = Field(2.0, ge=0, le=4, description="Weight of level i is sigma_i ** anneal_power; the paper uses 2.")


class DsmLossConfig(Section):
    """Denoising score matching (paper eq. 5 and 6)."""

    kind: Literal["dsm"] = Field("dsm", description="The paper's loss.")
    anneal_power: float = _ANNEAL_POWER
    antithetic: bool = Field(
        False,
        description="Average each image's loss over the noise z and -z, at twice the cost: less variance at low noise.",
    )


class SsmLossConfig(Section):
    """Sliced score matching with variance reduction (paper eq. 3), on images with noise of each level."""

    kind: Literal["ssm"] = Field(description="Needs no noise to be known; two to four times the cost of dsm.")
    anneal_power: float = _ANNEAL_POWER
    num_projections: int = Field(1, ge=1, le=64, description="Random directions v per image, whose mean is taken.")


class SingleSigmaLossConfig(Section):
    """The paper's negative control: denoising score matching at one sigma, unweighted (eq. 2)."""

    kind: Literal["single_sigma"] = Field(
        description="Needs noise.num_levels = 1, with noise.sigma_1 = noise.sigma_L (the paper: 0.01)."
    )


LossConfig = Annotated[DsmLossConfig | SsmLossConfig | SingleSigmaLossConfig, Field(discriminator="kind")]
