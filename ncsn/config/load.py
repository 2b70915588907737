"""Text to `Config` and back. Errors name the dotted path, the value, and the valid keys or range."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ncsn.config.location import path_parts
from ncsn.config.schema import Config
from ncsn.errors import ConfigError, Problem, problems_of

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
        return Config.model_validate(tree)
    except ValidationError as error:
        found = [problem for detail in error.errors() for problem in explain(detail, tree)]
        raise ConfigError.of(replace(problem, origin=origin) for problem in found) from None


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


def explain(detail: ErrorDetails, tree: dict[str, Any]) -> list[Problem]:
    """What pydantic found, by its dotted path. A validator's own `UserError` keeps its problems, below that path."""
    parts = path_parts(detail["loc"], tree)
    path = ".".join(parts)
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        valid = _valid_keys(parts, tree)
        close = difflib.get_close_matches(parts[-1], valid, n=1, cutoff=0.75)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return [Problem(path, "unknown key", f"{hint}valid keys: {', '.join(valid)}")]
    if kind == "missing":
        return [Problem(path, "missing", "it has no default")]
    if kind == "union_tag_not_found":
        return [Problem(f"{path}.kind", "missing", f"valid: {', '.join(_valid_kinds([*parts, 'kind'], tree))}")]
    if kind == "union_tag_invalid":
        return [Problem(f"{path}.kind", f"not one of {detail['ctx']['expected_tags']}", value=detail["ctx"]["tag"])]
    if kind == "value_error":
        return [
            replace(problem, key=".".join(filter(None, (path, problem.key))))
            for problem in problems_of(detail["ctx"]["error"])
        ]
    message = detail["msg"]
    if kind == "string_pattern_mismatch":
        message = "1 to 40 lower-case letters, digits, '-' and '_', starting and ending with a letter or digit"
    return [Problem(path, f"not valid: {message[0].lower()}{message[1:]}", value=value)]


def _valid_keys(parts: Sequence[str], tree: dict[str, Any]) -> list[str]:
    """Keys that may stand beside the last of `parts`, for the kind that the tree chose there."""
    return sorted({key for model in _models(parts, tree) for key in model.model_fields})


def _valid_kinds(parts: Sequence[str], tree: dict[str, Any]) -> list[str]:
    """Kinds that the section of the last of `parts` can have."""
    return [kind for model in _models(parts, tree) for kind in get_args(model.model_fields["kind"].annotation)]


def _models(parts: Sequence[str], tree: dict[str, Any]) -> list[type[BaseModel]]:
    """The sections that may hold the last of `parts`."""
    models: list[type[BaseModel]] = [Config]
    node: Any = tree
    for part in parts[:-1]:
        if isinstance(node, list) and part.isdigit():
            node = node[int(part)]
            continue
        node = node.get(part) if isinstance(node, dict) else None
        kind = node.get("kind") if isinstance(node, dict) else None
        named = [model for model in models if part in model.model_fields]
        # A part that is no field is a key of a mapping of sections.
        arms = [arm for model in named for arm in section_models(model, part)] if named else models
        models = [
            arm for arm in arms if "kind" in arm.model_fields and kind in get_args(arm.model_fields["kind"].annotation)
        ] or arms
    return models


def section_models(model: type[BaseModel], field: str) -> list[type[BaseModel]]:
    """The section classes that a field may hold, by itself or in a mapping: each arm of a union; none for a value."""
    return list(_sections_in(model.model_fields[field].annotation))


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for arm in get_args(annotation):
        yield from _sections_in(arm)
