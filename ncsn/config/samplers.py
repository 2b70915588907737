"""The samplers that `sampling.sampler.kind` can choose, each with its own settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from ncsn.config.section import Section
from ncsn.errors import UserError


class AnnealedLangevinConfig(Section):
    """Annealed Langevin dynamics (paper, Algorithm 1)."""

    kind: Literal["annealed_langevin"] = Field(description="The paper's sampler.")
    steps_per_level: int = Field(
        100, ge=1, le=100000, description="Langevin steps T at each level; NFE = T * num_levels."
    )
    epsilon: float = Field(
        2e-5,
        gt=0,
        le=1,
        description="Step size at the last level: a_i = epsilon * sigma_i^2 / sigma_L^2, x += a_i s + sqrt(2 a_i) z. "
        "The paper's printed Algorithm 1 with its epsilon is this one with epsilon / 2.",
    )
    denoise: bool = Field(True, description="End with x + sigma_L^2 s(x), one more NFE (Tweedie's formula).")
    consistent: bool = Field(
        False,
        description="Add sqrt(2 a_i - (a_i / sigma_i)^2) z instead, so that each level keeps exactly its noise; "
        "epsilon is at most sigma_L^2 then.",
    )


class LangevinConfig(Section):
    """Langevin dynamics at one noise level (paper, equation 4)."""

    kind: Literal["langevin"] = Field(description="Langevin dynamics at a single level, without annealing.")
    level: int = Field(
        -1, ge=-10000, lt=10000, description="The level, 0 = most noise; negative ones count from the last."
    )
    num_steps: int = Field(200, ge=1, le=1_000_000, description="Number of steps, the NFE.")
    step_size: float = Field(5e-5, gt=0, le=1, description="a in x += a s + sqrt(2 a) z.")
    denoise: bool = Field(True, description="End with x + sigma^2 s(x), one more NFE.")


class ConsistentAnnealedConfig(Section):
    """Consistent annealed sampling (Jolicoeur-Martineau et al. 2020)."""

    kind: Literal["consistent_annealed"] = Field(description="One step per level that leaves exactly the next sigma.")
    epsilon: float = Field(
        gt=0, le=1, description="Step size at the last level; within (1 +- q) sigma_L^2 for the ratio q of the levels."
    )
    refine: int = Field(1, ge=1, le=1000, description="Make the grid so many times finer; needs a continuous network.")
    denoise: bool = Field(True, description="End with x + sigma_L^2 s(x), one more NFE.")


class PredictorCorrectorConfig(Section):
    """Predictor-corrector sampling of the variance-exploding SDE (Song et al. 2021)."""

    kind: Literal["predictor_corrector"] = Field(
        description="A step of the reverse SDE, then Langevin steps, per level."
    )
    predictor: Literal["reverse_diffusion", "ancestral"] = Field("reverse_diffusion", description="The SDE's step.")
    corrector_steps: int = Field(1, ge=0, le=1000, description="Langevin steps per level.")
    snr: float = Field(0.16, gt=0, le=1, description="Signal-to-noise ratio r of the corrector's steps.")
    num_levels: int | None = Field(None, ge=2, description="Visit so many of the network's levels; null = all.")
    denoise: bool = Field(True, description="End with the predictor's step to sigma = 0, one more NFE.")


class ProbabilityFlowConfig(Section):
    """The probability-flow ODE on the network's own levels (Song et al. 2021)."""

    kind: Literal["probability_flow"] = Field(description="Deterministic: Euler (1 NFE per level) or Heun (2).")
    method: Literal["euler", "heun"] = Field("heun", description="First or second order.")
    num_levels: int | None = Field(None, ge=2, description="Visit so many of the network's levels; null = all.")
    spacing: Literal["geometric", "karras"] = Field("geometric", description="How the visited levels spread.")
    denoise: bool = Field(True, description="End with the step to sigma = 0, one more NFE.")


class KarrasHeunConfig(Section):
    """The stochastic Heun sampler of Karras et al. 2022 (Algorithm 2); needs a continuous network."""

    kind: Literal["karras_heun"] = Field(description="Heun on the grid of Karras et al., with churn.")
    num_steps: int = Field(18, ge=2, le=10000, description="Steps N; NFE = 2 N - 1.")
    rho: float = Field(7.0, gt=0, le=100, description="Exponent of the grid.")
    churn: float = Field(0.0, ge=0, le=1000, description="Total noise added again on the way; 0 = deterministic.")
    churn_min: float = Field(0.0, ge=0, le=1e4, description="Lowest sigma with churn.")
    churn_max: float = Field(1e4, gt=0, le=1e4, description="Highest sigma with churn.")
    churn_noise: float = Field(1.0, gt=0, le=2, description="Standard deviation of what churn adds; 1 keeps sigma.")
    denoise: bool = Field(True, description="End with the step to sigma = 0.")

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
    """The section of a sampler from its plain values."""
    return _SECTION.validate_python(values)
