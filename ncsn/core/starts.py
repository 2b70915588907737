"""Where a sampler starts.

Annealed Langevin forgets its start. A probability-flow ODE and ancestral steps do not: they need an x distributed as
the data plus noise of sigma_1. A normal distribution with the data's mean and covariance comes close, also where
sigma_1 is far below the spread of the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DataMoments:
    """Mean and covariance of the pixels of a data set, the covariance as V diag(variances - rest) V^T + rest I.

    Attributes:
        mean: float32 [C, H, W].
        directions: V^T, orthonormal rows of the leading principal components, float32 [K, D], D = C H W.
        variances: Variance along each, descending, float32 [K].
        rest: Mean variance of the D - K other directions.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    rest: float


def fit_moments(x: Tensor, *, num_components: int = 64) -> DataMoments:
    """Mean and leading principal components of images.

    Args:
        x: Images [N, C, H, W] in network space, N >= 2.
        num_components: K; fewer if N - 1 or D is smaller.

    Returns:
        Moments on the CPU; the total variance is the data's whatever K is.
    """
    if len(x) < 2:
        raise ValueError(f"moments need at least 2 images, got {len(x)}")
    flat = x.detach().cpu().flatten(1).to(torch.float64)
    mean = flat.mean(dim=0)
    flat = flat - mean
    count = min(num_components, len(flat) - 1, flat.shape[1])
    if flat.shape[1] <= len(flat):
        eigenvalues, vectors = torch.linalg.eigh(flat.T @ flat / (len(flat) - 1))
        variances, directions = eigenvalues.flip(0), vectors.flip(1).T
    else:
        _, singular, directions = torch.linalg.svd(flat, full_matrices=False)
        variances = singular.square() / (len(flat) - 1)
    total = float(flat.square().sum() / (len(flat) - 1))
    leading = variances[:count].clamp(min=0)
    rest = max(total - float(leading.sum()), 0.0) / max(flat.shape[1] - count, 1)
    return DataMoments(
        mean=mean.view(x.shape[1:]).float(),
        directions=directions[:count].float().contiguous(),
        variances=leading.float(),
        rest=rest,
    )


def moment_matched_start(moments: DataMoments, *, sigma: float, z: Tensor) -> Tensor:
    """A draw from N(mean, covariance + sigma^2 I), the normal distribution nearest to the noisy data.

    Args:
        moments: Of the data.
        sigma: Noise standard deviation of the sampler's first level.
        z: Standard normal numbers [B, C, H, W].
    """
    flat = z.flatten(1)
    directions = moments.directions.to(flat)
    rest = (moments.rest + sigma**2) ** 0.5
    gain = (moments.variances.to(flat) + sigma**2).sqrt() - rest
    spread = rest * flat + ((flat @ directions.T) * gain) @ directions
    start: Tensor = moments.mean.to(z) + spread.view_as(z)
    return start
