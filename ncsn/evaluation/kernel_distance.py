"""Kernel distance (KID): unbiased squared maximum mean discrepancy of features (Binkowski et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class KernelDistance:
    """Mean and population standard deviation over the subsets. Being unbiased, the mean may be negative."""

    mean: float
    std: float


def kernel_distance(
    a: npt.NDArray[np.floating],
    b: npt.NDArray[np.floating],
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """Mean squared MMD over random subsets, with the kernel k(x, y) = (x.y / D + 1)^3.

    Args:
        a: [N, D] features.
        b: [M, D] features; a memory map is read one subset at a time.
        num_subsets: pairs of subsets, each drawn without replacement.
        subset_size: feature vectors per subset; fewer if N or M is smaller.
        seed: of the subsets.

    Raises:
        ValueError: for different dimensions, fewer than two feature vectors, or values that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], got {list(a.shape)} and {list(b.shape)}")
    size = min(subset_size, len(a), len(b))
    if size < 2 or num_subsets < 1:
        raise ValueError(f"{num_subsets} subsets of {size} images give no estimate; use at least 1 subset of 2 images")
    generator = np.random.Generator(np.random.Philox(seed))
    # Subsets that are all of both sets do not differ: one is enough.
    repeats = 1 if size == len(a) == len(b) else num_subsets
    estimates = [squared_mmd(_draw(a, size, generator), _draw(b, size, generator)) for _ in range(repeats)]
    mean = float(np.mean(estimates))
    if not np.isfinite(mean):
        raise ValueError("features hold NaN or infinity; check the samples for them")
    return KernelDistance(mean=mean, std=float(np.std(estimates)))


def squared_mmd(x: Array, y: Array) -> float:
    """Unbiased estimate of MMD^2 from [m, D] and [n, D] float64 features, m and n at least 2."""
    m, n = len(x), len(y)
    within_x, within_y = _kernel(x, x), _kernel(y, y)
    same = (within_x.sum() - np.trace(within_x)) / (m * (m - 1)) + (within_y.sum() - np.trace(within_y)) / (n * (n - 1))
    return float(same - 2 * _kernel(x, y).mean())


def _kernel(x: Array, y: Array) -> Array:
    base = x @ y.T
    base /= x.shape[1]
    base += 1
    cube: Array = base * base * base  # a power of floats is many times slower
    return cube


def _draw(features: npt.NDArray[np.floating], size: int, generator: np.random.Generator) -> Array:
    # Sorted, because a memory map is read faster in order and the estimate does not depend on the order.
    rows = np.sort(generator.choice(len(features), size, replace=False))
    return np.asarray(features[rows], dtype=np.float64)
