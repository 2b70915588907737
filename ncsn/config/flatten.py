"""A config as dotted paths: for MLflow parameters and for saying what differs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ncsn.config.schema import Config

TRAINING_SECTIONS = ("name", "seed", "data", "noise", "network", "loss", "optimizer", "train")
"""What decides the weights. A run name belongs to one choice of these."""


def flatten(config: Config) -> dict[str, Any]:
    """Dotted path -> plain value; sequences stay lists."""
    return dict(_walk(config.model_dump(mode="json"), ""))


def changed_paths(
    one: Config, other: Config, *, sections: Iterable[str] = TRAINING_SECTIONS
) -> dict[str, tuple[Any, Any]]:
    """Dotted paths below `sections` whose values differ -> (value in one, value in other)."""
    wanted = tuple(sections)
    left, right = flatten(one), flatten(other)
    return {
        path: (left.get(path), right.get(path))
        for path in sorted(left.keys() | right.keys())
        if path.split(".")[0] in wanted and left.get(path) != right.get(path)
    }


def _walk(node: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _walk(value, f"{path}.")
        else:
            yield path, value
