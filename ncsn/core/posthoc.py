"""Averages of the weights with any memory, put together after training (Karras et al. 2024, section 3 and appendix C).

The power-function average of exponent g at time t has the weight profile p(tau) = (g + 1) tau^g / t^(g + 1) on [0, t].
Its relative width, the standard deviation of the profile over t, names it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ncsn.errors import InvalidValue

Array = NDArray[np.float64]

WIDEST = math.sqrt(1 / 12)  # relative width of the plain mean, whose exponent is 0


def relative_width(exponent: float) -> float:
    """The relative width of the profile of exponent g >= 0."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def exponent_of(width: float) -> float:
    """The exponent g >= 0 of the profile with this relative width, in (0, `WIDEST`]."""
    if not 0 < width <= WIDEST:
        raise InvalidValue(f"a relative width is more than 0 and at most {WIDEST:.4f}, got {width}")
    square = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - square, 12.0 - square])
    return max(0.0, float(roots.real.max()))


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


@dataclass(frozen=True)
class Reconstruction:
    """How to put an average together from stored ones."""

    coefficients: Array  # of the stored averages [N]
    error: float  # relative L2 error of the weight profile


def reconstruction(stored: Sequence[Profile], target: Profile) -> Reconstruction:
    """The combination of stored averages whose profile is nearest to that of `target` in the least-squares sense.

    The coefficients are held to a sum of one, so that weights which do not change are kept. Karras
    et al. do not hold them, which with few snapshots makes smooth weights a few percent too small.
    """
    count = len(stored)
    gram = np.array([[inner_product(one, other) for other in stored] for one in stored])
    right = np.array([inner_product(one, target) for one in stored])
    norm = inner_product(target, target)
    # In units of the target's own norm, so that the row of the sum has a like size.
    matrix, sides = gram / norm, right / norm
    matrix = np.block([[matrix, np.ones((count, 1))], [np.ones((1, count)), np.zeros((1, 1))]])
    sides = np.append(sides, 1.0)
    found: Array = np.asarray(np.linalg.solve(matrix, sides)[:count], np.float64)
    square = (found @ gram @ found - 2 * found @ right) / norm + 1
    return Reconstruction(found, math.sqrt(max(square, 0.0)))
