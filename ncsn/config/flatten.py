"""A config as dotted paths: for MLflow parameters and for saying what differs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ncsn.config.schema import Config

_DECIDING = ("name", "seed", "data", "noise", "network", "loss", "optimizer", "train")
_NOT_DECIDING = (
    "data.root",
    "data.download",
    "data.rows_per_part",
    "train.checkpoint_every_images",
    "train.report_every_images",
    "train.keep_checkpoints",
    "train.keep_best",
)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted path -> plain value; sequences stay lists."""
    return dict(_walk(config.model_dump(mode="json"), ""))


def training_settings(config: Config) -> dict[str, Any]:
    """What decides the weights, as dotted path -> value. A run name belongs to one choice of these.

    Where the images and the work are, and how often something is kept or reported, is not among them.
    """
    return {
        path: value
        for path, value in flatten(config).items()
        if path.split(".")[0] in _DECIDING and path not in _NOT_DECIDING
    }


def changed_settings(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Those of `training_settings` that differ -> (value in one, value in other).

    Noise levels that one of the two leaves to the images are not compared: the images decide, not the config.
    """
    left, right = training_settings(one), training_settings(other)
    chosen_later = one.noise.kind != other.noise.kind
    return {
        path: (left.get(path), right.get(path))
        for path in sorted(left.keys() | right.keys())
        if left.get(path) != right.get(path) and not (chosen_later and path.startswith("noise."))
    }


def _walk(node: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _walk(value, f"{path}.")
        else:
            yield path, value
