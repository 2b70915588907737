"""Text to `Config` and back. Errors name the dotted path, the value, and the valid keys or range."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import yaml

from ncsn.config.rules import checked
from ncsn.config.schema import Config
from ncsn.config.search import space_problems
from ncsn.errors import ConfigError

_DEFAULT_KINDS = {"noise": "geometric", "loss": "dsm"}
"""Kinds of sections that may leave theirs out."""


def from_yaml(text: str, *, overrides: Sequence[str] = (), origin: str = "config") -> Config:
    """Parse one complete experiment.

    Args:
        text: YAML (or JSON, a subset of it).
        overrides: `a.b=value` strings applied in order; the value is read as YAML.
        origin: where the text came from, for error messages.

    Raises:
        ConfigError: naming each wrong key or value.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(origin, f"not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(origin, f"expected a mapping of sections, got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    if tree.get("noise") == "auto":
        tree["noise"] = {"kind": "auto"}
    for section, kind in _DEFAULT_KINDS.items():
        if isinstance(tree.get(section), dict):
            tree[section] = {"kind": kind, **tree[section]}
    try:
        config = checked(tree)
        found = space_problems(config)
    except ConfigError as error:
        found = list(error.problems)
    if found:
        raise ConfigError.of(replace(problem, origin=origin) for problem in found)
    return config


def with_sampler(config: Config, sampler: str) -> Config:
    """The experiment with another sampler.

    Args:
        config: The experiment.
        sampler: A kind, for its default settings or, if it is the experiment's kind, its own; or `{kind: ..., ...}`.

    Raises:
        ConfigError: for an unknown kind or setting, or one that does not fit the network and its levels.
    """
    if sampler == config.sampling.sampler.kind:
        return config
    chosen = sampler if sampler.lstrip().startswith("{") else f"{{kind: {sampler}}}"
    return from_yaml(to_yaml(config), overrides=[f"sampling.sampler={chosen}"], origin="sampler")


def from_json(text: str) -> Config:
    """Parse the canonical string that travels between processes."""
    return from_yaml(text, origin="config (JSON)")


def to_json(config: Config) -> str:
    """Canonical form: sorted keys, no spaces. Equal configs give equal strings."""
    return json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def to_yaml(config: Config) -> str:
    """Readable form in schema order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, raw = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError("--set", "expected a.b=value", hint="write for example noise.num_levels=50", value=override)
    node = tree
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError("--set", f"{key!r} is a value, not a section", value=override)
    try:
        node[keys[-1]] = _number(yaml.safe_load(raw))
    except yaml.YAMLError:
        raise ConfigError("--set", "the value is not valid YAML", value=override) from None


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 (no dot) as text; a person means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


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
