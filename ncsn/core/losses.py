"""Score matching losses (Song & Ermon 2019, equations 3, 5 and 6) and their report per noise level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""A score network: (x [B, C, H, W], level int64 [B]) -> score of x's shape."""


@dataclass(frozen=True)
class DsmLoss:
    """A batch's loss.

    Attributes:
        loss: Scalar with gradient, the batch mean of the weighted loss summed over pixels (equation 6).
        per_image: float32 [B] without gradient: |sigma s + z|^2 / D, which a zero network brings to 1.0 in expectation.
    """

    loss: Tensor
    per_image: Tensor


def per_pixel(values: Tensor, x: Tensor) -> Tensor:
    """View values [B] so that they broadcast over images x [B, ...]."""
    return values.view(-1, *[1] * (x.ndim - 1))


def dsm_loss(
    network: ScoreFunction,
    x: Tensor,
    *,
    level: Tensor,
    sigmas: Tensor,
    z: Tensor,
    anneal_power: float = 2.0,
    antithetic: bool = False,
) -> DsmLoss:
    """Denoising score matching at one noise level per image (equations 5 and 6).

    The loss of an image is sigma^p / 2 |s(x + sigma z, level) + z / sigma|^2, computed as
    sigma^(p - 2) / 2 |sigma s + z|^2 so that no term grows as sigma falls. The norm sums over pixels.

    Args:
        network: The score network.
        x: Clean images [B, C, H, W].
        level: Noise level of each image, int64 [B], 0 = most noise.
        sigmas: The noise levels, float [L], descending.
        z: Standard normal numbers of x's shape.
        anneal_power: p; the paper's lambda(sigma) = sigma^2 is p = 2.
        antithetic: Average each image's loss over z and -z, at twice the cost. The term that is linear in z, whose
            variance grows as 1 / sigma^2 (before weighting), nearly cancels.

    Returns:
        The batch's loss, in float32 whatever the network computes in (float64 if x is).
    """
    sigma = sigmas.to(x.dtype)[level]
    if antithetic:
        both = _squared_residual(network, _twice(x), level=_twice(level), sigma=_twice(sigma), z=torch.cat((z, -z)))
        squared = both.view(2, -1).mean(dim=0)
    else:
        squared = _squared_residual(network, x, level=level, sigma=sigma, z=z)
    weighted = squared if anneal_power == 2.0 else squared * sigma ** (anneal_power - 2.0)
    return DsmLoss(loss=0.5 * weighted.mean(), per_image=squared.detach() / x[0].numel())


def _twice(values: Tensor) -> Tensor:
    return torch.cat((values, values))


def _squared_residual(network: ScoreFunction, x: Tensor, *, level: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
    """Give |sigma s(x + sigma z) + z|^2 of each image, [B]."""
    scale = per_pixel(sigma, x)
    score = network(torch.addcmul(x, z, scale), level).to(x.dtype)
    return torch.addcmul(z, score, scale).square().flatten(1).sum(dim=1)


def ssm_loss(
    network: ScoreFunction,
    x: Tensor,
    *,
    level: Tensor,
    sigmas: Tensor,
    z: Tensor,
    v: Tensor,
    anneal_power: float = 2.0,
) -> DsmLoss:
    """Sliced score matching with variance reduction (2019, section 2.1 and equation 3) on perturbed data.

    The loss of an image is sigma^p (1/2 |s|^2 + v . grad_x (v . s)) at x + sigma z, averaged over the projections. It
    equals denoising score matching up to a constant in expectation, and it is negative once the network has learned.

    Args:
        network: The score network; it must be twice differentiable.
        x: Clean images [B, C, H, W].
        level: Noise level of each image, int64 [B].
        sigmas: Noise levels [L].
        z: Standard normal numbers of x's shape.
        v: Projections [P, B, C, H, W], standard normal (or any of zero mean and unit covariance).
        anneal_power: p.

    Returns:
        The batch's loss; `per_image` is 1 + 2 sigma^2 l / D for the unweighted loss l, which has the expectation of
        `dsm_loss`'s, so that the two kinds of training can be compared.
    """
    sigma = sigmas.to(x.dtype)[level]
    noisy = torch.addcmul(x, z, per_pixel(sigma, x)).requires_grad_()
    with torch.enable_grad():
        score = network(noisy, level).to(x.dtype)
        slopes = []
        for projection in v:
            (gradient,) = torch.autograd.grad((projection * score).sum(), noisy, create_graph=True)
            slopes.append((projection * gradient).flatten(1).sum(dim=1))
        unweighted = 0.5 * score.square().flatten(1).sum(dim=1) + torch.stack(slopes).mean(dim=0)
    normalised = 1 + 2 * sigma.square() * unweighted.detach() / x[0].numel()
    return DsmLoss(loss=(sigma**anneal_power * unweighted).mean(), per_image=normalised)


def level_sums(per_image: Tensor, *, level: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """Sums and counts of a per-image value at each level, for adding up over batches and workers.

    The mean at a level is the total of the sums over the total of the counts.

    Args:
        per_image: Values [B].
        level: Level of each, int64 [B].
        num_levels: Number of levels L.

    Returns:
        float64 [L] sums and float64 [L] counts.
    """
    member = level[:, None] == torch.arange(num_levels, device=level.device)
    values = torch.where(member, per_image.detach().to(torch.float64)[:, None], 0.0)
    return values.sum(dim=0), member.to(torch.float64).sum(dim=0)
