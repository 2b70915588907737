"""The noise levels sigma_1 > ... > sigma_L (Song & Ermon 2019, section 3.2)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def geometric_sigmas(sigma_1: float, sigma_L: float, num_levels: int) -> Tensor:
    """The geometric sequence from `sigma_1` down to `sigma_L`.

    Args:
        sigma_1: Largest noise standard deviation, in pixel units of [0, 1].
        sigma_L: Smallest one, 0 < sigma_L < sigma_1.
        num_levels: Number of levels L >= 2.

    Returns:
        float32 [L], descending, computed in float64; both ends are exact.
    """
    if not 0 < sigma_L < sigma_1 < float("inf"):
        raise ValueError(f"need 0 < sigma_L < sigma_1, got sigma_1 = {sigma_1} and sigma_L = {sigma_L}")
    if num_levels < 2:
        raise ValueError(f"a geometric sequence needs at least 2 levels, got num_levels = {num_levels}")
    return torch.from_numpy(np.geomspace(sigma_1, sigma_L, num_levels)).to(torch.float32)
