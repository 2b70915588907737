"""Sizes of the networks with preconditioning for images of a size, about as costly as each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_SMALLEST_MAP = 8  # where the network stops halving, and attends
_WIDTHS = ((40, 16), (20, 24), (10, 48), (0, 96))  # channels of feature maps of more pixels a side
_BASE_WIDTHS = ((40, 8), (20, 16), (0, 32))  # of images of more pixels a side


def unet(size: int, *, scale: float) -> dict[str, Any]:
    """A U-Net for images of this size, of `scale` times the usual width; its resolutions cost about the same."""
    maps = [size]
    while maps[-1] > _SMALLEST_MAP or len(maps) < 2:
        maps.append((maps[-1] + 1) // 2)
    return {
        "widths": [int(scale * _at(_WIDTHS, side)) for side in maps],
        "blocks_per_resolution": 1 if scale <= 1 else 2,
        "attention_sizes": [maps[-1]] if size > _SMALLEST_MAP else [],
    }


def ddpmpp(size: int, *, scale: float) -> dict[str, Any]:
    """A DDPM++ network for images of this size, of `scale` times the usual width."""
    maps = [size]
    while maps[-1] % 2 == 0 and (maps[-1] > _SMALLEST_MAP or len(maps) < 2):
        maps.append(maps[-1] // 2)
    return {
        "base_width": max(8, int(scale * _at(_BASE_WIDTHS, size))),
        "multipliers": [1, *[2] * (len(maps) - 1)],
        "blocks_per_resolution": 1 if scale <= 1 else 2,
        "attention_sizes": [],  # the lowest resolution has it anyway
        "dropout": 0.1,
    }


NETWORKS: dict[str, Callable[..., dict[str, Any]]] = {"unet": unet, "ddpmpp": ddpmpp}


def is_wide(network: Mapping[str, Any]) -> bool:
    """Whether these settings of a network have more than the usual channels, which needs a lower learning rate."""
    widths = network.get("widths") or [network.get("base_width", 0) * each for each in network.get("multipliers", [])]
    return max(widths, default=0) > _WIDTHS[-1][1]


def _at(table: tuple[tuple[int, int], ...], side: int) -> int:
    return next(width for least, width in table if side > least)
