"""Inpainting with annealed Langevin dynamics (Song & Ermon 2019, Algorithm 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ncsn.core.langevin import denoise_step, langevin_step, level_steps, score_at_level

if TYPE_CHECKING:
    from ncsn.core.langevin import NoiseSource, OnLevel
    from ncsn.core.losses import ScoreFunction


@torch.no_grad()
def inpaint(
    network: ScoreFunction,
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
    consistent: bool = False,
    on_level: OnLevel | None = None,
) -> Tensor:
    """Complete images of which some pixels are known (Algorithm 2).

    At each level the known pixels are reference + sigma z with one z for all its steps; each step updates the whole
    image and then sets these pixels. For k completions of each image repeat reference k times
    (`reference.repeat_interleave(k, dim=0)`) and give each repetition its own start and noise.

    Args:
        network: The score network, in eval mode.
        x: Initial state [B, C, H, W]; uniform on [0, 1) in the paper. Not changed.
        reference: Images with the known pixels [B, C, H, W]; other pixels of it are not used.
        mask: True where a pixel is known, bool of shape [H, W], [1 or C, H, W] or [B, 1 or C, H, W].
        sigmas: Noise levels [L], descending.
        epsilon: Step size at the last level, in the convention of `ncsn.core.langevin`.
        steps_per_level: T.
        noise: Source of the normal draws: numbers 0 to L T - 1 for the steps, as in `annealed_langevin`, then L T + i
            for the known pixels of level i.
        denoise: End with x + sigma_L^2 s(x, L).
        restore: Give the known pixels back exactly at the end. The paper leaves them with noise of sigma_L.
        consistent: As in `annealed_langevin`; without it what is made carries more noise than what is known.
        on_level: Receives each level and the state after its last step.

    Returns:
        The completed images, not clamped.

    Raises:
        ValueError: The mask's shape or type does not fit, or the reference's shape is not x's.
    """
    known = _expanded_mask(mask, x)
    if reference.shape != x.shape:
        raise ValueError(f"the reference has shape {list(reference.shape)}, the images have {list(x.shape)}")
    if steps_per_level < 1:
        raise ValueError(f"steps_per_level must be at least 1, got {steps_per_level}")
    num_steps = len(sigmas) * steps_per_level
    for level, (step_size, noise_std) in enumerate(level_steps(sigmas, epsilon, consistent=consistent)):
        noisy_reference = torch.add(reference, noise(num_steps + level), alpha=float(sigmas[level]))
        for step in range(level * steps_per_level, (level + 1) * steps_per_level):
            score = score_at_level(network, x, level=level)
            x = langevin_step(x, score=score, step_size=step_size, z=noise(step), noise_std=noise_std)
            x = torch.where(known, noisy_reference, x)
        if on_level is not None:
            on_level(level, x)
    if denoise:
        x = denoise_step(network, x, level=len(sigmas) - 1, sigma=float(sigmas[-1]))
    return torch.where(known, reference, x) if restore else x


def _expanded_mask(mask: Tensor, x: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask must be bool, True where a pixel is known, got {mask.dtype}")
    batch, channels, height, width = x.shape
    shape = list(mask.shape)
    fits = shape[-2:] == [height, width] and (
        mask.ndim == 2
        or (mask.ndim == 3 and shape[0] in (1, channels))
        or (mask.ndim == 4 and shape[0] in (1, batch) and shape[1] in (1, channels))
    )
    if not fits:
        raise ValueError(
            f"the mask has shape {shape}; for images of {channels} x {height} x {width} it must be "
            f"[{height}, {width}], [1 or {channels}, {height}, {width}] or one such per image"
        )
    return mask.to(x.device).expand_as(x)
