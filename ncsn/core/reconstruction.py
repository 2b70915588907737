"""EMAs of any width, put together after training from snapshots of two (Karras et al. 2024, section 3, appendix C)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Profile:
    """A power-function average."""

    exponent: float
    time: float  # of its end, more than 0, such as images seen


def inner_product(one: Profile, other: Profile) -> float:
    """Integral of the product of two weight profiles."""
    first, last = sorted((one, other), key=lambda profile: profile.time)
    g, h = one.exponent, other.exponent
    return (g + 1) * (h + 1) * math.pow(first.time / last.time, last.exponent) / ((g + h + 1) * last.time)


def reconstruction(stored: Sequence[Profile], target: Profile) -> tuple[list[float], float]:
    """The combination of stored averages whose profile is nearest to that of `target` in the least-squares sense.

    The coefficients are held to a sum of one, so that weights which do not change are kept. Karras
    et al. do not hold them, which with few snapshots makes smooth weights a few percent too small.

    Returns:
        Coefficients of the stored averages, and the relative L2 error of the weight profile.
    """
    count = len(stored)
    gram = np.array([[inner_product(one, other) for other in stored] for one in stored])
    right = np.array([inner_product(one, target) for one in stored])
    norm = inner_product(target, target)
    # In units of the target's own norm, so that the row of the sum has a like size.
    matrix, sides = gram / norm, right / norm
    matrix = np.block([[matrix, np.ones((count, 1))], [np.ones((1, count)), np.zeros((1, 1))]])
    sides = np.append(sides, 1.0)
    found = np.linalg.solve(matrix, sides)[:count]
    square = (found @ gram @ found - 2 * found @ right) / norm + 1
    return found.tolist(), math.sqrt(max(square, 0.0))
