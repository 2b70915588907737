"""The samplers, each a frozen dataclass that is also the config's section `sampling.sampler` of its kind.

What they do is in `ncsn.core.samplers.chain`; nothing here imports torch. A new sampler is a class here, in
`AnySampler` too, and a case in `sample` and in `_levels` there. It has a field `denoise`, annotates each field with its
range and describes it in a string below it.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from ncsn.errors import UserError

Spacing = Literal["geometric", "karras"]

_FIRST_ADDED = 0.821 / 0.5  # sigma of the first noise of `Consistency`, in units of sigma_data (Geng et al. 2024)
_BOUNDS = {
    "gt": (operator.gt, "more than"),
    "ge": (operator.ge, "at least"),
    "lt": (operator.lt, "less than"),
    "le": (operator.le, "at most"),
}


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """A way from a start to images; annealed Langevin forgets its start, the others need data plus noise of sigma_1."""

    # Read by pydantic where the config has this section.
    __pydantic_config__: ClassVar[Any] = {"use_attribute_docstrings": True, "extra": "forbid", "allow_inf_nan": False}
    several_levels: ClassVar[bool] = True  # whether it needs more than one
    uniform_start: ClassVar[bool] = False  # from pixels, instead of a normal draw with the moments of the data

    kind: str

    def __post_init__(self) -> None:
        """Raise `UserError` with the name of a field whose value is out of its range."""
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            base, *rules = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            value = getattr(self, name)
            if get_origin(base) is Literal and value not in get_args(base):
                raise UserError(name, f"must be one of {', '.join(map(str, get_args(base)))}", value=value)
            for rule in rules if value is not None else ():
                for key, (compare, words) in _BOUNDS.items():
                    bound = getattr(rule, key, None)
                    if bound is not None and not compare(value, bound):
                        raise UserError(name, f"must be {words} {bound:g}", value=value)

    @property
    def any_sigma(self) -> tuple[str, str] | None:
        """The field that needs a network for any sigma, and what to use with one that knows only its own levels."""
        return None

    @abstractmethod
    def num_evaluations(self, num_levels: int) -> int:
        """NFE per image for a network of `num_levels` levels."""


@dataclass(frozen=True, kw_only=True)
class AnnealedLangevin(Sampler):
    """Annealed Langevin dynamics (paper, Algorithm 1)."""

    uniform_start = True

    kind: Literal["annealed_langevin"] = "annealed_langevin"
    """The sampler of the 2019 paper."""
    steps_per_level: Annotated[int, Ge(1), Le(100_000)] = 100
    """Langevin steps T at each level; NFE = T * num_levels."""
    epsilon: Annotated[float, Gt(0), Le(1)] = 2e-5
    """Step size at the last level: a_i = epsilon * sigma_i^2 / sigma_L^2, x += a_i s + sqrt(2 a_i) z. Algorithm 1 as
    printed, with the paper's epsilon, is the same with epsilon / 2."""
    denoise: bool = True
    """End with x + sigma_L^2 s(x) (Tweedie's formula), one more NFE."""
    consistent: bool = False
    """Add sqrt(2 a_i - (a_i / sigma_i)^2) z instead, which keeps the noise of each level exact; epsilon must then be at
    most sigma_L^2."""

    def num_evaluations(self, num_levels: int) -> int:
        return num_levels * self.steps_per_level + self.denoise


@dataclass(frozen=True, kw_only=True)
class Langevin(Sampler):
    """Langevin dynamics at one noise level (paper, equation 4)."""

    several_levels = False
    uniform_start = True

    kind: Literal["langevin"] = "langevin"
    """Langevin dynamics at one level, without annealing."""
    level: Annotated[int, Ge(-10_000), Lt(10_000)] = -1
    """The level; 0 = most noise, -1 = the last level, -2 = the one before it."""
    num_steps: Annotated[int, Ge(1), Le(1_000_000)] = 200
    """Number of steps; one NFE each."""
    step_size: Annotated[float, Gt(0), Le(1)] = 5e-5
    """a in x += a s + sqrt(2 a) z."""
    denoise: bool = True
    """End with x + sigma^2 s(x), one more NFE."""

    def num_evaluations(self, num_levels: int) -> int:  # noqa: ARG002 - one level only
        return self.num_steps + self.denoise


@dataclass(frozen=True, kw_only=True)
class KarrasHeun(Sampler):
    """The stochastic Heun sampler of Karras et al. 2022 (Algorithm 2), for networks that take any sigma (not ncsn)."""

    any_sigma = "kind", "dpm_solver with num_levels"

    kind: Literal["karras_heun"] = "karras_heun"
    """Heun's method on the grid of Karras et al., with churn."""
    num_steps: Annotated[int, Ge(2), Le(10_000)] = 18
    """Steps N; NFE = 2 N - 1."""
    churn: Annotated[float, Ge(0), Le(1000)] = 0.0
    """How much noise to add during sampling; 0 = deterministic. None is added at the smallest level, before the step to
    sigma = 0, where Algorithm 2 with S_min = 0 adds some."""
    denoise: bool = True
    """End with a step to sigma = 0."""

    def num_evaluations(self, num_levels: int) -> int:  # noqa: ARG002 - its own grid
        return 2 * (self.num_steps - 1) + self.denoise


@dataclass(frozen=True, kw_only=True)
class DpmSolver(Sampler):
    """DPM-Solver++(2M) and its SDE form (Lu et al. 2022); order 1 is DDIM, and with eta = 1 the ancestral sampler."""

    kind: Literal["dpm_solver"] = "dpm_solver"
    """Multistep; as accurate as Heun at half the NFE."""
    num_steps: Annotated[int, Ge(2), Le(10_000)] = 18
    """Grid points N, the last of which is the smallest level; NFE = N."""
    num_levels: Annotated[int | None, Ge(2)] = None
    """Visit this many of the network's own levels instead of a grid of num_steps points; for network.kind = ncsn, which
    takes no other sigma."""
    spacing: Spacing = "karras"
    """Spacing of the grid."""
    order: Literal[1, 2] = 2
    """1 = DDIM (or ancestral, with eta = 1), 2 = the multistep method 2M."""
    eta: Annotated[float, Ge(0), Le(1)] = 0.0
    """Noise added at each step: 0 = the ODE, 1 = the reverse SDE."""
    denoise: bool = True
    """End with a step to sigma = 0."""

    @property
    def any_sigma(self) -> tuple[str, str] | None:
        return ("num_levels", "the number of these to visit") if self.num_levels is None else None

    def num_evaluations(self, num_levels: int) -> int:
        """An upper bound with `karras` spacing of the network's own levels."""
        points = self.num_steps if self.num_levels is None else min(self.num_levels, num_levels)
        return points - (not self.denoise)


@dataclass(frozen=True, kw_only=True)
class Consistency(Sampler):
    """The sampler of consistency models (Song et al. 2023, Algorithm 1), for networks that were tuned for it."""

    any_sigma = "kind", "dpm_solver with num_levels"

    kind: Literal["consistency"] = "consistency"
    """Denoise, add noise of a smaller sigma, and so on: for a network that loss.kind = consistency has tuned."""
    steps: Annotated[int, Ge(1), Le(16)] = 2
    """Evaluations; NFE = steps."""
    sigmas: tuple[float, ...] | Literal["auto"] = "auto"
    """The noise to add before each evaluation but the first, which is at sigma_1: steps - 1 numbers, descending, in
    units of pixels in [0, 1]. auto = first 1.642 * network.sigma_data, which is 0.821 for the photographs of Geng et
    al. 2024 in [-1, 1], then each half of the one before."""
    denoise: bool = True
    """End with the last evaluation; without it the image still has the noise before it."""

    def __post_init__(self) -> None:
        """See `Sampler`; `sigmas` must fit `steps`."""
        super().__post_init__()
        if not self.denoise and self.steps == 1:
            raise UserError("denoise", "must be true where the only evaluation is the last one", value=self.denoise)
        if self.sigmas == "auto":
            return
        given: Any = self.sigmas  # whatever a caller gives
        numbers = isinstance(given, tuple | list) and all(isinstance(each, int | float) for each in given)
        falls = numbers and all(math.inf > higher > lower for higher, lower in pairwise([*given, 0.0]))
        if not falls or len(given) != self.steps - 1:
            reason = f"must be steps - 1 = {self.steps - 1} positive numbers, descending, or auto"
            raise UserError("sigmas", reason, value=self.sigmas)
        object.__setattr__(self, "sigmas", tuple(given))

    def num_evaluations(self, num_levels: int) -> int:  # noqa: ARG002 - its own sigmas
        return self.steps - (not self.denoise)

    def placed(self, sigma_data: float) -> tuple[float, ...]:
        """The numbers of `sigmas`; auto depends on the images."""
        if self.sigmas != "auto":
            return self.sigmas
        return tuple(_FIRST_ADDED * sigma_data / 2**k for k in range(self.steps - 1))


AnySampler = AnnealedLangevin | Langevin | KarrasHeun | DpmSolver | Consistency
