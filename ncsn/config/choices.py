"""The sections with a `kind`: noise, network, loss, and the domains of a search."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ncsn.errors import UserError


class Section(BaseModel):
    """A frozen group of settings without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NoiseConfig(Section):
    """The noise levels sigma_1 > ... > sigma_L, a geometric sequence (paper section 4.1)."""

    kind: Literal["geometric"] = Field("geometric", description="Levels given by the settings below.")
    sigma_1: float = Field(
        1.0, gt=0, le=1e4, description="Largest noise standard deviation, in units of pixels in [0, 1]."
    )
    sigma_L: float = Field(0.01, gt=0, le=1e3, description="Smallest noise standard deviation, same unit.")
    num_levels: int = Field(
        10, ge=1, le=10000, description="Number of levels L. One level, with sigma_1 = sigma_L, means no annealing."
    )

    @model_validator(mode="after")
    def _descending(self) -> NoiseConfig:
        if self.num_levels == 1 and self.sigma_1 != self.sigma_L:
            raise UserError(
                "sigma_1", f"num_levels = 1 needs sigma_1 = sigma_L, which is {self.sigma_L}", value=self.sigma_1
            )
        if self.num_levels > 1 and self.sigma_1 <= self.sigma_L:
            raise UserError(
                "sigma_1",
                f"must be larger than sigma_L = {self.sigma_L}, since the levels go from most to least noise",
                value=self.sigma_1,
            )
        return self


class AutoNoiseConfig(Section):
    """Levels chosen from the training images when training starts (NCSNv2, techniques 1 and 2); `noise: auto`."""

    kind: Literal["auto"] = Field(description="sigma_1 is the largest distance between two images.")
    sigma_L: float = Field(
        0.01, gt=0, le=1e3, description="Smallest noise standard deviation, in units of pixels in [0, 1]."
    )
    overlap: float = Field(
        0.5, gt=0, lt=0.99, description="Overlap C of neighboring levels; the published settings of NCSNv2 have 0.567."
    )


NoiseChoice = Annotated[NoiseConfig | AutoNoiseConfig, Field(discriminator="kind")]


class NcsnNetworkConfig(Section):
    """The RefineNet of the 2019 paper (appendix A), conditioned by instance normalization++."""

    kind: Literal["ncsn"] = Field(description="The network of the 2019 paper.")
    num_features: int = Field(
        128, ge=4, le=1024, description="Channels of the first stage: 128 for CIFAR-10, 64 for MNIST."
    )


class NcsnV2NetworkConfig(Section):
    """The network of NCSNv2 (Song & Ermon 2020): unconditional, its output divided by sigma."""

    kind: Literal["ncsnv2"] = Field(description="The network of the 2020 paper.")
    num_features: int = Field(128, ge=4, le=1024, description="Channels of the first stage; the paper uses 128.")
    depth: Literal["standard", "deeper", "deepest"] = Field(
        "standard", description="For images up to 64 (standard), 128 (deeper) or 256 pixels (deepest)."
    )


class UnetNetworkConfig(Section):
    """A compact U-Net with the preconditioning of Karras et al. 2022."""

    kind: Literal["unet"] = Field(description="A compact U-Net.")
    widths: tuple[int, ...] = Field(
        (32, 64, 64),
        min_length=1,
        max_length=6,
        description="Channels at each resolution; each resolution is half the size of the one before.",
    )
    blocks_per_resolution: int = Field(2, ge=1, le=8, description="Residual blocks at each resolution, down and up.")
    embedding_features: int = Field(128, ge=8, le=2048, description="Width of the embedding of sigma.")
    attention_sizes: tuple[int, ...] = Field(
        (), description="Sizes in pixels of the feature maps that get self-attention."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability inside the blocks.")
    sigma_data: float = Field(
        0.25, gt=0, le=10, description="Standard deviation of the pixels, which are in [0, 1], for the preconditioning."
    )


class DdpmppNetworkConfig(Section):
    """The DDPM++ network as Karras et al. 2022 train it; the defaults are those of their CIFAR-10 network."""

    kind: Literal["ddpmpp"] = Field(description="The network of the best published figures for 32 and 64 pixels.")
    base_width: int = Field(
        128, ge=8, le=1024, multiple_of=4, description="Channels of the first feature maps; a multiple of 4."
    )
    multipliers: tuple[Annotated[int, Field(ge=1, le=16)], ...] = Field(
        (2, 2, 2),
        min_length=1,
        max_length=6,
        description="Channels at each resolution in units of base_width; each resolution is half the size of the one "
        "before. The paper has [2, 2, 2] for 32 pixels and [1, 2, 2, 2] for 64.",
    )
    blocks_per_resolution: int = Field(
        4, ge=1, le=8, description="Residual blocks at each resolution on the way down; on the way up one more."
    )
    attention_sizes: tuple[int, ...] = Field(
        (16,),
        description="Sizes in pixels of the feature maps that get self-attention; the lowest resolution has it anyway "
        "once.",
    )
    embedding_multiplier: int = Field(
        4, ge=1, le=16, description="Width of the embedding of sigma in units of base_width."
    )
    dropout: float = Field(0.13, ge=0, lt=1, description="Dropout probability inside the blocks.")
    sigma_data: float = Field(
        0.25, gt=0, le=10, description="Standard deviation of the pixels, which are in [0, 1], for the preconditioning."
    )


NetworkConfig = Annotated[
    NcsnNetworkConfig | NcsnV2NetworkConfig | UnetNetworkConfig | DdpmppNetworkConfig, Field(discriminator="kind")
]


_ANNEAL_POWER = Field(2.0, ge=0, le=4, description="Weight of level i is sigma_i ** anneal_power; the paper uses 2.")


class DsmLossConfig(Section):
    """Denoising score matching (paper eq. 5 and 6)."""

    kind: Literal["dsm"] = Field("dsm", description="The loss of the 2019 paper.")
    anneal_power: float = _ANNEAL_POWER
    antithetic: bool = Field(
        False,
        description="Average each image's loss over the noise z and -z: less variance at low noise, for twice the "
        "cost.",
    )


class SsmLossConfig(Section):
    """Sliced score matching with variance reduction (paper eq. 3), at each noise level."""

    kind: Literal["ssm"] = Field(description="Does not need to know the noise; costs two to four times as much as dsm.")
    anneal_power: float = _ANNEAL_POWER
    num_projections: int = Field(1, ge=1, le=64, description="Random directions v per image; the loss is their mean.")


class SingleSigmaLossConfig(Section):
    """The paper's negative control: denoising score matching at one sigma, unweighted (eq. 2)."""

    kind: Literal["single_sigma"] = Field(
        description="Needs noise.num_levels = 1 and noise.sigma_1 = noise.sigma_L (0.01 in the paper)."
    )


LossConfig = Annotated[DsmLossConfig | SsmLossConfig | SingleSigmaLossConfig, Field(discriminator="kind")]


class _RangeDomain(Section):
    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")

    @model_validator(mode="after")
    def _ascending(self) -> _RangeDomain:
        if self.low >= self.high:
            raise UserError("low", f"must be less than high = {self.high:g}", value=self.low)
        return self


class UniformDomain(_RangeDomain):
    """Values in a range, all equally likely; whole numbers if the setting is one."""

    kind: Literal["uniform"] = Field(description="A range.")


class LogDomain(_RangeDomain):
    """Values in a range, all orders of magnitude equally likely."""

    kind: Literal["log"] = Field(description="A range of positive numbers, on a logarithmic scale.")

    @model_validator(mode="after")
    def _positive(self) -> LogDomain:
        if self.low <= 0:
            raise UserError("low", "must be positive for kind: log", hint="use kind: uniform", value=self.low)
        return self


class ChoiceDomain(Section):
    """One of a few values."""

    kind: Literal["choice"] = Field(description="One of a few values.")
    values: tuple[Any, ...] = Field(min_length=1, description="The values.")


Domain = Annotated[UniformDomain | LogDomain | ChoiceDomain, Field(discriminator="kind")]
