"""Langevin dynamics, its annealed form, and inpainting (Song & Ermon 2019, equation 4 and Algorithms 1 and 2).

Convention: x <- x + a s(x) + sqrt(2 a) z with a_i = epsilon sigma_i^2 / sigma_L^2. Algorithm 1 as printed takes half
of that step, so its epsilon is twice the one here; the epsilons of the released code and of NCSNv2 are the ones here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor

from ncsn.core.losses import ScoreFunction
from ncsn.errors import InvalidValue

# Number of a draw (0, 1, ...) -> standard normal tensor of the state's shape.
NoiseSource = Callable[[int], Tensor]
# Called with the level just finished and the state, which must not be changed or kept without a copy.
OnLevel = Callable[[int, Tensor], None]


class Fields(Protocol):
    """Score functions of which each holds in some band of sigma."""

    def field_at(self, sigma: float) -> ScoreFunction:
        """The score function that holds at sigma."""


# Samplers know sigma as a number, and ask by it: to read it from a GPU they would wait for all that is computed there.
def field_of(network: ScoreFunction | Fields, sigma: float) -> ScoreFunction:
    """The score function that holds at sigma. A step must stay with one function to keep its order."""
    field_at: Callable[[float], ScoreFunction] | None = getattr(network, "field_at", None)
    return cast("ScoreFunction", network) if field_at is None else field_at(sigma)


def level_steps(sigmas: Tensor, epsilon: float, *, consistent: bool) -> list[tuple[float, float]]:
    """Step size a_i = epsilon sigma_i^2 / sigma_L^2 of each level and the deviation of its steps' noise.

    The deviation is sqrt(2 a), or with `consistent` sqrt(2 a - (a / sigma)^2), with which a point mass under noise of
    sigma stays so: steps of size a alone leave more, 2 / (2 - a / sigma^2) of its variance.
    """
    if not epsilon > 0:
        raise InvalidValue(f"the step size must be positive, got epsilon = {epsilon}")
    squares = sigmas.detach().to("cpu", torch.float64).square().tolist()
    steps = [epsilon * square / squares[-1] for square in squares]
    # Off by default: large consistent steps lose spread in directions where the data has much.
    if not consistent:
        return [(a, math.sqrt(2 * a)) for a in steps]
    if epsilon > squares[-1] * (1 + 1e-6):
        raise InvalidValue(f"consistent steps need epsilon of at most sigma_L^2 = {squares[-1]:.4g}, got {epsilon:g}")
    return [(a, math.sqrt(2 * a - a * a / square)) for a, square in zip(steps, squares, strict=True)]


def langevin_step(x: Tensor, *, score: Tensor, step_size: float, z: Tensor, noise_std: float | None = None) -> Tensor:
    """One update x + a s + sqrt(2 a) z (equation 4 in the form of the released code), a new tensor.

    `noise_std` takes the place of sqrt(2 a), see `level_steps`.
    """
    return torch.add(x, score, alpha=step_size).add_(z, alpha=noise_std or math.sqrt(2 * step_size))


def denoise_step(network: ScoreFunction | Fields, x: Tensor, *, level: int, sigma: float) -> Tensor:
    """Tweedie's posterior mean x + sigma^2 s(x) of the clean image at a level, whose sigma it is."""
    return torch.add(x, score_at_level(network, x, level=level, sigma=sigma), alpha=sigma * sigma)


def score_at_level(network: ScoreFunction | Fields, x: Tensor, *, level: int, sigma: float) -> Tensor:
    """Score of a batch that is at one level, whose sigma it is, in x's type."""
    field, levels = field_of(network, sigma), torch.full((len(x),), level, dtype=torch.int64, device=x.device)
    return field(x, levels).to(x.dtype)


@torch.no_grad()
def annealed_langevin(
    network: ScoreFunction | Fields,
    *,
    x: Tensor,
    sigmas: Tensor,
    epsilon: float,
    steps_per_level: int,
    noise: NoiseSource,
    denoise: bool,
    consistent: bool = False,
    on_level: OnLevel | None = None,
    hold: Callable[[int], Callable[[Tensor], Tensor]] | None = None,
) -> Tensor:
    """Annealed Langevin dynamics (Algorithm 1; the step convention is this module's), not clamped to [0, 1].

    NFE is L * steps_per_level, and one more with `denoise`.

    Args:
        x: Initial state [B, C, H, W]; the paper draws it uniformly from [0, 1).
        sigmas: Noise levels [L], descending.
        epsilon: Step size at the last level.
        noise: Draw number level * T + t is used at step t of a level.
        denoise: End with x + sigma_L^2 s(x, L), which removes the noise of the last level.
        consistent: Scale the noise so that the steps keep a level's sigma, see `level_steps`.
        on_level: Receives the state after the last step of a level, before the denoising.
        hold: Level -> function that is applied to the state after each of its steps.
    """
    if steps_per_level < 1:
        raise InvalidValue(f"steps_per_level must be at least 1, got {steps_per_level}")
    values: list[float] = sigmas.tolist()
    for level, (step_size, noise_std) in enumerate(level_steps(sigmas, epsilon, consistent=consistent)):
        held = hold(level) if hold is not None else None
        for step in range(level * steps_per_level, (level + 1) * steps_per_level):
            score = score_at_level(network, x, level=level, sigma=values[level])
            x = langevin_step(x, score=score, step_size=step_size, z=noise(step), noise_std=noise_std)
            x = x if held is None else held(x)
        if on_level is not None:
            on_level(level, x)
    return denoise_step(network, x, level=len(values) - 1, sigma=values[-1]) if denoise else x


@torch.no_grad()
def inpaint(
    network: ScoreFunction | Fields,
    *,
    x: Tensor,
    reference: Tensor,
    mask: Tensor,
    sigmas: Tensor,
    epsilon: float,
    steps_per_level: int,
    noise: NoiseSource,
    denoise: bool = True,
    restore: bool = True,
) -> Tensor:
    """Complete images of which some pixels are known (Algorithm 2). The other arguments are `annealed_langevin`'s.

    At each level the known pixels are reference + sigma z with one z for all its steps; each step updates the whole
    image and then sets these pixels. For k completions of each image repeat reference k times
    (`reference.repeat_interleave(k, dim=0)`) and give each repetition its own start and noise.

    Args:
        reference: Images with the known pixels [B, C, H, W]; other pixels are not used.
        mask: True where a pixel is known, bool of shape [H, W], [1 or C, H, W] or [B, 1 or C, H, W].
        noise: Numbers 0 to L T - 1 for the steps, then L T + i for the known pixels of level i.
        restore: Restore the known pixels exactly at the end. The paper leaves them with noise of sigma_L.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask must be bool, True where a pixel is known, got {mask.dtype}")
    known = mask.to(x.device).expand_as(x)
    if reference.shape != x.shape:
        raise ValueError(f"the reference has shape {list(reference.shape)}, the images have {list(x.shape)}")
    num_steps, values = len(sigmas) * steps_per_level, sigmas.tolist()

    def hold(level: int) -> Callable[[Tensor], Tensor]:
        noisy = torch.add(reference, noise(num_steps + level), alpha=values[level])
        return lambda state: torch.where(known, noisy, state)

    x = annealed_langevin(
        network,
        x=x,
        sigmas=sigmas,
        epsilon=epsilon,
        steps_per_level=steps_per_level,
        noise=noise,
        denoise=denoise,
        hold=hold,
    )
    return torch.where(known, reference, x) if restore else x
