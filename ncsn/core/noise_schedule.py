"""The noise levels sigma_1 > ... > sigma_L, given or chosen from a dataset.

Song & Ermon 2019, section 4.1; Song & Ermon 2020, techniques 1, 2 and 4.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ncsn.errors import InvalidValue

_BLOCK_VALUES = 2**22  # of a block, which has fewer images if they are large
_SMALL_BLOCK = 512  # smaller blocks skip more pairs
_CACHED = 16
_ROUNDING = 1e-5
_EPSILON_CANDIDATES = 200_000


def geometric_sigmas(sigma_1: float, sigma_L: float, num_levels: int) -> Tensor:
    """The geometric sequence from `sigma_1` down to `sigma_L`, in pixel units of [0, 1], float32 [L].

    It is computed in float64, and both ends are exact. A single level needs sigma_1 = sigma_L.
    """
    if num_levels == 1 and 0 < sigma_L == sigma_1 < float("inf"):
        return torch.tensor([sigma_1], dtype=torch.float32)
    if not 0 < sigma_L < sigma_1 < float("inf"):
        raise InvalidValue(f"need 0 < sigma_L < sigma_1, got sigma_1 = {sigma_1} and sigma_L = {sigma_L}")
    if num_levels < 2:
        raise InvalidValue(f"a geometric sequence needs at least 2 levels, got num_levels = {num_levels}")
    return torch.from_numpy(np.geomspace(sigma_1, sigma_L, num_levels)).to(torch.float32)


def largest_distance(x: Tensor, *, flips: bool = False, most_work: float = math.inf) -> float:
    """Largest distance between two images in pixel units of [0, 1], without comparing all of them.

    The distance of two images is at most the sum of their distances from the mean image. So images are taken in the
    order of these, farthest first, and a pair that cannot exceed the largest distance so far is skipped.

    Args:
        x: Float [N, C, H, W] in [0, 1], or uint8 [N, H, W, C].
        flips: As training mirrors images, mirrored ones count too.
        most_work: Multiplications, about, after which the search ends with the largest distance so far.
    """
    # A few images at a time stay in the processor's cache: of all images at once, torch takes ten times as long.
    values, in_bytes = x.numpy(), x.dtype == torch.uint8
    mean = values.sum(axis=0, dtype=np.int64 if in_bytes else np.float64) / len(x)
    if flips:
        # With the mirror images in the mean, each of them is as far from it as the original.
        mean = (mean + np.flip(mean, -2 if in_bytes else -1)) / 2
    mean = mean.astype(np.float32)
    distances_to_mean = np.empty(len(x), np.float32)
    for start in range(0, len(x), _CACHED):
        away = (values[start : start + _CACHED] - mean).reshape(-1, mean.size)
        distances_to_mean[start : start + _CACHED] = np.sqrt(np.einsum("nd,nd->n", away, away))
    radii, center = torch.from_numpy(distances_to_mean), torch.from_numpy(mean)
    if in_bytes:
        radii, center = radii / 255, center.permute(2, 0, 1) / 255
    center = center.flatten()
    order = radii.argsort(descending=True)
    starts = torch.split(order, max(1, min(_SMALL_BLOCK, _BLOCK_VALUES // x[0].numel())))
    reach = [float(radii[indices[0]]) for indices in starts]
    best, work = 0.0, 0.0

    @lru_cache(4)
    def rows(block: int, *, mirrored: bool = False) -> Tensor:
        return _rows(x[starts[block]], mirrored=mirrored) - center

    for row, column in ((i, j) for i in range(len(starts)) for j in range(i + 1)):
        if (reach[row] + reach[column]) * (1 + _ROUNDING) <= best:
            continue
        if work > most_work:
            break
        for mirrored in (False, True)[: 1 + flips]:
            distances = torch.cdist(rows(row), rows(column, mirrored=mirrored))
            best, work = max(best, float(distances.max())), work + distances.numel() * len(center)
    return best


def _rows(x: Tensor, *, mirrored: bool = False) -> Tensor:
    """Images as float rows [B, D] in pixel units of [0, 1]."""
    images = x.permute(0, 3, 1, 2).float() / 255 if x.dtype == torch.uint8 else x.float()
    return (images.flip(-1) if mirrored else images).flatten(1)


def level_overlap(ratio: float, *, dimension: int) -> float:
    """Technique 2's C: the share of one level's shell of radii that lies in the 3-sigma shell of the next.

    For gamma = sigma_i / sigma_{i+1} > 1 and D pixels times channels, it is
    Phi(sqrt(2D) (gamma - 1) + 3 gamma) - Phi(sqrt(2D) (gamma - 1) - 3 gamma), falling from about 1 to 0.
    """
    gap = math.sqrt(2 * dimension) * (ratio - 1)
    # Upper tails, because both arguments are far above zero where the overlap is small.
    return 0.5 * (math.erfc((gap - 3 * ratio) / math.sqrt(2)) - math.erfc((gap + 3 * ratio) / math.sqrt(2)))


def ratio_for_overlap(dimension: int, *, overlap: float = 0.5) -> float:
    """The ratio gamma in (1, 3) of neighboring levels at which `level_overlap` is `overlap` (technique 2)."""
    if dimension < 1 or not 0 < overlap < 0.99:
        raise InvalidValue(f"need dimension >= 1 and 0 < overlap < 0.99, got {dimension} and {overlap}")
    low, high = 1.0, 3.0
    if level_overlap(high, dimension=dimension) > overlap:
        raise InvalidValue(f"with {dimension} dimensions levels a factor 3 apart still overlap by more than {overlap}")
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if level_overlap(middle, dimension=dimension) > overlap else (low, middle)
    return 0.5 * (low + high)


def variance_ratio(epsilon: float, *, sigma_L: float, ratio: float, steps_per_level: int) -> float:
    """Technique 4: variance after T Langevin steps at a level over its sigma^2, for a point mass as data.

    It is (1 - r)^{2T} (gamma^2 - b) + b with r = epsilon / sigma_L^2, b = 2 / (2 - r), and the ratio gamma of the level
    before to this one; above 1, and 1 is ideal. Epsilon is in the convention of `ncsn.core.samplers.langevin`.
    """
    r = epsilon / sigma_L**2
    if not 0 < r < 2:
        raise InvalidValue(f"epsilon must be within 0 and 2 sigma_L^2 = {2 * sigma_L**2:g}, got {epsilon:g}")
    stationary = 2 / (2 - r)
    return (1 - r) ** (2 * steps_per_level) * (ratio**2 - stationary) + stationary


def best_epsilon(*, sigma_L: float, ratio: float, steps_per_level: int) -> float:
    """Technique 4: the epsilon in (0, sigma_L^2) whose `variance_ratio` is closest to 1, by grid search.

    The ratio need not have a single minimum; the grid's neighbors are 0.007 % apart.
    """
    r = np.geomspace(1e-6, 1, _EPSILON_CANDIDATES, endpoint=False)
    stationary = 2 / (2 - r)
    ratios = (1 - r) ** (2 * steps_per_level) * (ratio**2 - stationary) + stationary
    return float(r[np.argmin(np.abs(ratios - 1))]) * sigma_L**2


def suggest_noise(largest: float, *, dimension: int, sigma_L: float = 0.01) -> tuple[float, int]:
    """Techniques 1 and 2 of NCSNv2 in turn, for D = `dimension` pixels times channels: sigma_1, and the number L.

    sigma_1 is the `largest` distance between two images, in pixel units of [0, 1], to the four digits that all machines
    share. The published settings have an overlap of 0.567.
    """
    sigma_1 = float(f"{largest:.4g}")
    if not sigma_L > 0:
        raise InvalidValue(f"sigma_L must be positive, got {sigma_L}")
    if sigma_1 <= sigma_L:
        raise InvalidValue(
            f"the largest distance between images is {sigma_1:g}, not above sigma_L = {sigma_L:g}: "
            "the images are all alike; lower sigma_L"
        )
    widest = ratio_for_overlap(dimension)  # of neighboring levels
    return sigma_1, max(2, 1 + math.ceil(math.log(sigma_1 / sigma_L) / math.log(widest)))
