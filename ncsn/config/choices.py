"""The sections with a `kind`: noise, network, loss, sampler, and the domains of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

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


NetworkConfig = Annotated[NcsnNetworkConfig | NcsnV2NetworkConfig | UnetNetworkConfig, Field(discriminator="kind")]


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


class SamplerSection(Section):
    """The settings of a sampler, and what it needs of the network and the noise levels."""

    any_sigma: ClassVar[bool] = False  # a network for any sigma, not only for its noise levels
    several_levels: ClassVar[bool] = True


class AnnealedLangevinConfig(SamplerSection):
    """Annealed Langevin dynamics (paper, Algorithm 1)."""

    kind: Literal["annealed_langevin"] = Field(description="The sampler of the 2019 paper.")
    steps_per_level: int = Field(
        100, ge=1, le=100000, description="Langevin steps T at each level; NFE = T * num_levels."
    )
    epsilon: float = Field(
        2e-5,
        gt=0,
        le=1,
        description="Step size at the last level: a_i = epsilon * sigma_i^2 / sigma_L^2, x += a_i s + sqrt(2 a_i) z. "
        "Algorithm 1 as printed, with the paper's epsilon, is the same with epsilon / 2.",
    )
    denoise: bool = Field(True, description="End with x + sigma_L^2 s(x) (Tweedie's formula), one more NFE.")
    consistent: bool = Field(
        False,
        description="Add sqrt(2 a_i - (a_i / sigma_i)^2) z instead, which keeps the noise of each level exact; "
        "epsilon must then be at most sigma_L^2.",
    )


class LangevinConfig(SamplerSection):
    """Langevin dynamics at one noise level (paper, equation 4)."""

    several_levels = False

    kind: Literal["langevin"] = Field(description="Langevin dynamics at one level, without annealing.")
    level: int = Field(
        -1, ge=-10000, lt=10000, description="The level; 0 = most noise, -1 = the last level, -2 = the one before it."
    )
    num_steps: int = Field(200, ge=1, le=1_000_000, description="Number of steps; one NFE each.")
    step_size: float = Field(5e-5, gt=0, le=1, description="a in x += a s + sqrt(2 a) z.")
    denoise: bool = Field(True, description="End with x + sigma^2 s(x), one more NFE.")


class ConsistentAnnealedConfig(SamplerSection):
    """Consistent annealed sampling (Jolicoeur-Martineau et al. 2020)."""

    kind: Literal["consistent_annealed"] = Field(description="One step per level, which leaves exactly the next sigma.")
    epsilon: float = Field(
        gt=0,
        le=1,
        description="Step size at the last level, within (1 +- q) sigma_L^2, where q is the ratio of adjacent levels.",
    )
    refine: int = Field(
        1,
        ge=1,
        le=1000,
        description="How many times finer the steps are than the levels; more than 1 needs a network that takes any "
        "sigma, so not ncsn.",
    )
    denoise: bool = Field(True, description="End with x + sigma_L^2 s(x), one more NFE.")


class PredictorCorrectorConfig(SamplerSection):
    """Predictor-corrector sampling of the variance-exploding SDE (Song et al. 2021)."""

    kind: Literal["predictor_corrector"] = Field(
        description="At each level, a step of the reverse SDE and then Langevin steps."
    )
    predictor: Literal["reverse_diffusion", "ancestral"] = Field(
        "reverse_diffusion", description="Kind of reverse SDE step."
    )
    corrector_steps: int = Field(1, ge=0, le=1000, description="Langevin steps per level.")
    snr: float = Field(0.16, gt=0, le=1, description="Signal-to-noise ratio r of the Langevin steps.")
    num_levels: int | None = Field(None, ge=2, description="How many of the network's levels to visit; null = all.")
    denoise: bool = Field(True, description="End with a predictor step to sigma = 0, one more NFE.")


class ProbabilityFlowConfig(SamplerSection):
    """The probability-flow ODE at the network's levels (Song et al. 2021)."""

    kind: Literal["probability_flow"] = Field(description="Deterministic; Euler (1 NFE per level) or Heun (2).")
    method: Literal["euler", "heun"] = Field("heun", description="euler = first order, heun = second order.")
    num_levels: int | None = Field(None, ge=2, description="How many of the network's levels to visit; null = all.")
    spacing: Literal["geometric", "karras"] = Field("geometric", description="Spacing of the visited levels.")
    denoise: bool = Field(True, description="End with a step to sigma = 0, one more NFE.")


class KarrasHeunConfig(SamplerSection):
    """The stochastic Heun sampler of Karras et al. 2022 (Algorithm 2), for networks that take any sigma (not ncsn)."""

    any_sigma = True

    kind: Literal["karras_heun"] = Field(description="Heun's method on the grid of Karras et al., with churn.")
    num_steps: int = Field(18, ge=2, le=10000, description="Steps N; NFE = 2 N - 1.")
    rho: float = Field(7.0, gt=0, le=100, description="Exponent of the grid.")
    churn: float = Field(0.0, ge=0, le=1000, description="How much noise to add during sampling; 0 = deterministic.")
    churn_min: float = Field(0.0, ge=0, le=1e4, description="Lowest sigma with churn.")
    churn_max: float = Field(1e4, gt=0, le=1e4, description="Highest sigma with churn.")
    churn_noise: float = Field(1.0, gt=0, le=2, description="Standard deviation of the added noise; 1 keeps sigma.")
    denoise: bool = Field(True, description="End with a step to sigma = 0.")

    @model_validator(mode="after")
    def _churns_somewhere(self) -> KarrasHeunConfig:
        if self.churn_min >= self.churn_max:
            raise UserError("churn_min", f"must be below churn_max = {self.churn_max:g}", value=self.churn_min)
        return self


SamplerConfig = Annotated[
    AnnealedLangevinConfig
    | LangevinConfig
    | ConsistentAnnealedConfig
    | PredictorCorrectorConfig
    | ProbabilityFlowConfig
    | KarrasHeunConfig,
    Field(discriminator="kind"),
]
_SECTION: TypeAdapter[SamplerConfig] = TypeAdapter(SamplerConfig)


def parse_sampler(values: Mapping[str, Any]) -> SamplerConfig:
    """The section of a sampler from plain values."""
    return _SECTION.validate_python(values)


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
