"""Neon: away from what training on a network's own samples does to its weights (2510.03597).

A sampler of few steps draws too little of the distribution that the network knows. A network that is trained on such
samples moves toward them, so its weights minus the first ones point away from the data, and the first ones minus a
multiple of that difference are nearer to the data.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def extrapolated(weights: Mapping[str, Tensor], self_trained: Mapping[str, Tensor], w: float) -> dict[str, Tensor]:
    """The weights theta_r - w (theta_s - theta_r): theta_r for w = 0 and theta_s for w = -1, to the last bit.

    Args:
        weights: Parameters theta_r of a network, float32.
        self_trained: Those after a short training on its own samples, theta_s.
        w: The multiple.

    Raises:
        ValueError: The two have other names or shapes.
    """
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in (weights, self_trained)]
    if shapes[0] != shapes[1]:
        raise ValueError("the weights are of two different networks")
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
