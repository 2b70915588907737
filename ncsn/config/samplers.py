"""The section `sampling.sampler`: one class per kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from ncsn.config.choices import Section
from ncsn.config.noise import LevelsConfig, NoiseConfig
from ncsn.errors import InvalidValue, Problem, UserError


class SamplerSection(Section):
    """The settings of a sampler, and what it needs of the network and the noise levels."""

    several_levels: ClassVar[bool] = True

    @property
    def any_sigma(self) -> tuple[str, str] | None:
        """The setting that needs a network for any sigma, and what to use with one that knows only its own levels."""
        return None


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

    @property
    def any_sigma(self) -> tuple[str, str] | None:
        """See `SamplerSection`."""
        return ("refine", "refine = 1") if self.refine > 1 else None


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

    kind: Literal["karras_heun"] = Field(description="Heun's method on the grid of Karras et al., with churn.")
    num_steps: int = Field(18, ge=2, le=10000, description="Steps N; NFE = 2 N - 1.")
    rho: float = Field(7.0, gt=0, le=100, description="Exponent of the grid.")
    churn: float = Field(0.0, ge=0, le=1000, description="How much noise to add during sampling; 0 = deterministic.")
    churn_min: float = Field(0.0, ge=0, le=1e4, description="Lowest sigma with churn.")
    churn_max: float = Field(1e4, gt=0, le=1e4, description="Highest sigma with churn.")
    churn_noise: float = Field(1.0, gt=0, le=2, description="Standard deviation of the added noise; 1 keeps sigma.")
    denoise: bool = Field(True, description="End with a step to sigma = 0.")

    @property
    def any_sigma(self) -> tuple[str, str]:
        """See `SamplerSection`."""
        return "kind", "probability_flow"

    @model_validator(mode="after")
    def _churns_somewhere(self) -> KarrasHeunConfig:
        if self.churn_min >= self.churn_max:
            raise UserError("churn_min", f"must be below churn_max = {self.churn_max:g}", value=self.churn_min)
        return self


class _MultistepConfig(SamplerSection):
    """The grid of the multistep samplers."""

    num_levels: int | None = Field(
        None,
        ge=2,
        description="Visit this many of the network's own levels instead of a grid of num_steps points; for "
        "network.kind = ncsn, which takes no other sigma.",
    )
    spacing: Literal["geometric", "karras"] = Field("karras", description="Spacing of the grid.")
    rho: float = Field(7.0, gt=0, le=100, description="Exponent of the karras grid.")
    denoise: bool = Field(True, description="End with a step to sigma = 0.")

    @property
    def any_sigma(self) -> tuple[str, str] | None:
        """See `SamplerSection`."""
        return ("num_levels", "the number of these to visit") if self.num_levels is None else None


class DpmSolverConfig(_MultistepConfig):
    """DPM-Solver++(2M) and its SDE form (Lu et al. 2022)."""

    kind: Literal["dpm_solver"] = Field(description="Multistep; as accurate as Heun at half the NFE.")
    num_steps: int = Field(18, ge=2, le=10000, description="Grid points N; NFE = N.")
    order: Literal[1, 2] = Field(2, description="1 = DDIM (or ancestral, with eta = 1), 2 = the multistep method 2M.")
    eta: float = Field(0.0, ge=0, le=1, description="Noise added at each step: 0 = the ODE, 1 = the reverse SDE.")


class UniPCConfig(_MultistepConfig):
    """UniPC, a multistep predictor-corrector (Zhao et al. 2023)."""

    kind: Literal["unipc"] = Field(description="Multistep; more accurate than dpm_solver from about 12 steps on.")
    num_steps: int = Field(12, ge=2, le=10000, description="Grid points N; NFE = N.")
    order: Literal[2, 3] = Field(3, description="Order of the predictor; 3 is unstable with fewer than 8 points.")


SamplerConfig = Annotated[
    AnnealedLangevinConfig
    | LangevinConfig
    | ConsistentAnnealedConfig
    | PredictorCorrectorConfig
    | ProbabilityFlowConfig
    | KarrasHeunConfig
    | DpmSolverConfig
    | UniPCConfig,
    Field(discriminator="kind"),
]
_SECTION: TypeAdapter[SamplerConfig] = TypeAdapter(SamplerConfig)


def parse_sampler(values: Mapping[str, Any]) -> SamplerConfig:
    """The section of a sampler from plain values; `InvalidValue` with the first that is out of range."""
    try:
        return _SECTION.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidValue(f"{first['loc'][-1]} = {first['input']}: {first['msg'].lower()}") from None


def level_problems(sampler: SamplerConfig, levels: NoiseConfig | LevelsConfig, *, key: str) -> Iterator[Problem]:
    """What of a sampler does not fit the noise levels that it visits, which the section `key` has."""
    if isinstance(sampler, LangevinConfig) and not -levels.num_levels <= sampler.level < levels.num_levels:
        yield Problem(
            "sampling.sampler.level",
            f"not one of {key}.num_levels = {levels.num_levels} levels",
            f"use 0 to {levels.num_levels - 1}, or -1 for the last",
            sampler.level,
        )
    if isinstance(sampler, AnnealedLangevinConfig) and sampler.consistent and sampler.epsilon > levels.sigma_L**2:
        yield Problem(
            "sampling.sampler.epsilon",
            f"more than {key}.sigma_L^2 = {levels.sigma_L**2:g}, the maximum with sampling.sampler.consistent = true",
            "lower it",
            sampler.epsilon,
        )
    visited = getattr(sampler, "num_levels", None)  # some samplers can skip levels
    if visited is not None and visited > levels.num_levels:
        yield Problem(
            "sampling.sampler.num_levels",
            f"more than {key}.num_levels = {levels.num_levels}",
            "use fewer, or null for all",
            visited,
        )
    if isinstance(sampler, ConsistentAnnealedConfig) and levels.num_levels > 1:
        step = (levels.sigma_L / levels.sigma_1) ** (1 / ((levels.num_levels - 1) * sampler.refine))
        low, high = ((1 + sign * step) * levels.sigma_L**2 for sign in (-1, 1))
        if not low <= sampler.epsilon <= high:
            yield Problem(
                "sampling.sampler.epsilon",
                f"out of range for consistent annealed sampling with these levels of {key}",
                f"use {low:.4g} to {high:.4g}",
                sampler.epsilon,
            )
