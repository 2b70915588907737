"""Neon: weights that are moved away from those of training on the network's own samples (2510.03597).

A sampler of few steps misses a part of the distribution that the network knows. A network that is trained on such
samples moves toward them, so the change of its weights points away from the data, and the first weights minus a
multiple of that change are nearer to the data.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ncsn.core.networks.transfer import misfits
from ncsn.errors import InvalidValue


def extrapolated(weights: Mapping[str, Tensor], self_trained: Mapping[str, Tensor], w: float) -> dict[str, Tensor]:
    """The weights theta_r - w (theta_s - theta_r): theta_r for w = 0 and theta_s for w = -1, to the last bit.

    theta_r are the float32 parameters of a network, theta_s those after a short training on its own samples.
    """
    if found := misfits(self_trained, weights):
        raise InvalidValue(f"the weights are of two different networks: {found}")
    return {name: torch.lerp(tensor, self_trained[name], -w) for name, tensor in weights.items()}


def lowest_point(values: Mapping[float, float]) -> float:
    """Where a function of one minimum is least, from its values at some places.

    The vertex of the parabola through the least value and its two neighbors; at an end of the places, that end.
    """
    places = sorted(values)
    least = min(range(len(places)), key=lambda index: values[places[index]])
    if least in (0, len(places) - 1):
        return places[least]
    a, b, c = places[least - 1 : least + 2]
    left, right = (values[b] - values[a]) / (b - a), (values[c] - values[b]) / (c - b)
    bend = (right - left) / (c - a)
    return b if bend <= 0 else (a + b) / 2 - left / (2 * bend)
