"""Langevin dynamics and its annealed form (Song & Ermon 2019, equation 4 and Algorithm 1).

Convention: x <- x + a s(x) + sqrt(2 a) z with a_i = epsilon sigma_i^2 / sigma_L^2. Algorithm 1 as printed takes half
of that step, so its epsilon is twice the one here; the epsilons of the released code and of NCSNv2 are the ones here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ncsn.core.losses import ScoreFunction

NoiseSource = Callable[[int], Tensor]
"""Number of a draw (0, 1, ...) -> standard normal tensor of the state's shape."""

OnLevel = Callable[[int, Tensor], None]
"""Called with the level just finished and the state; the state must not be changed or kept without a copy."""


def step_sizes(sigmas: Tensor, epsilon: float) -> Tensor:
    """Step size a_i = epsilon sigma_i^2 / sigma_L^2 of each level, float64 [L] on the CPU."""
    if not epsilon > 0:
        raise ValueError(f"the step size must be positive, got epsilon = {epsilon}")
    squared = sigmas.detach().to("cpu", torch.float64).square()
    return epsilon * squared / squared[-1]


def level_steps(sigmas: Tensor, epsilon: float, *, consistent: bool) -> list[tuple[float, float]]:
    """Step size a and deviation of the noise of the steps at each level.

    The deviation is sqrt(2 a), or with `consistent` sqrt(2 a - (a / sigma)^2), with which a point mass under noise of
    sigma stays so: steps of size a alone leave more, 2 / (2 - a / sigma^2) of its variance.

    Raises:
        ValueError: epsilon is not positive, or too large for consistent steps.
    """
    steps = step_sizes(sigmas, epsilon).tolist()
    if not consistent:
        return [(a, math.sqrt(2 * a)) for a in steps]
    squares = sigmas.detach().to("cpu", torch.float64).square().tolist()
    if epsilon > squares[-1] * (1 + 1e-6):
        raise ValueError(f"consistent steps need epsilon of at most sigma_L^2 = {squares[-1]:.4g}, got {epsilon:g}")
    return [(a, math.sqrt(2 * a - a * a / square)) for a, square in zip(steps, squares, strict=True)]


def langevin_step(x: Tensor, *, score: Tensor, step_size: float, z: Tensor, noise_std: float | None = None) -> Tensor:
    """One update x + a s + sqrt(2 a) z (equation 4 in the form of the released code).

    Args:
        x: State.
        score: Score at x.
        step_size: a.
        z: Standard normal numbers of x's shape.
        noise_std: What stands for sqrt(2 a), see `level_steps`.

    Returns:
        The new state, a new tensor.
    """
    return torch.add(x, score, alpha=step_size).add_(z, alpha=noise_std or math.sqrt(2 * step_size))


def denoise_step(network: ScoreFunction, x: Tensor, *, level: int, sigma: float) -> Tensor:
    """Tweedie's posterior mean x + sigma^2 s(x) of the clean image at a level."""
    return torch.add(x, score_at_level(network, x, level=level), alpha=sigma * sigma)


def score_at_level(network: ScoreFunction, x: Tensor, *, level: int) -> Tensor:
    """Score of a batch that is at one level, in x's type."""
    return network(x, torch.full((len(x),), level, dtype=torch.int64, device=x.device)).to(x.dtype)


@torch.no_grad()
def annealed_langevin(
    network: ScoreFunction,
    *,
    x: Tensor,
    sigmas: Tensor,
    epsilon: float,
    steps_per_level: int,
    noise: NoiseSource,
    denoise: bool,
    consistent: bool = False,
    on_level: OnLevel | None = None,
) -> Tensor:
    """Annealed Langevin dynamics (Algorithm 1; the step convention is this module's).

    An image's result depends on its own state and noise only, so with a keyed noise source it is the same in every
    batch. NFE is L * steps_per_level, and one more with `denoise`.

    Args:
        network: The score network, in eval mode.
        x: Initial state [B, C, H, W]; the paper draws it uniformly from [0, 1). It is not changed.
        sigmas: Noise levels [L], descending.
        epsilon: Step size at the last level.
        steps_per_level: T.
        noise: Source of the normal draws; draw number level * T + t is used at step t of a level.
        denoise: End with x + sigma_L^2 s(x, L), which removes the noise of the last level.
        consistent: Scale the noise of the steps so that a level's sigma stays what it is, see `level_steps`.
        on_level: Receives each level and the state after its last step, before the denoising.

    Returns:
        The final state, not clamped to [0, 1].
    """
    if steps_per_level < 1:
        raise ValueError(f"steps_per_level must be at least 1, got {steps_per_level}")
    for level, (step_size, noise_std) in enumerate(level_steps(sigmas, epsilon, consistent=consistent)):
        for step in range(level * steps_per_level, (level + 1) * steps_per_level):
            score = score_at_level(network, x, level=level)
            x = langevin_step(x, score=score, step_size=step_size, z=noise(step), noise_std=noise_std)
        if on_level is not None:
            on_level(level, x)
    return denoise_step(network, x, level=len(sigmas) - 1, sigma=float(sigmas[-1])) if denoise else x
