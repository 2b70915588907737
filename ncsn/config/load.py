"""Text to `Config` and back, and the settings that differ between two configs."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from ncsn.config.problems import is_mapping, leaves, set_value, types_at
from ncsn.config.rules import checked
from ncsn.config.schema import TERMS, Config
from ncsn.environment import IMAGE_VARIABLE, RAY_VARIABLES
from ncsn.errors import ConfigError, InvalidValue, Problem, shown_value

EXAMPLES = Path(__file__).parents[1] / "configs"
_DEEPEST = 32  # levels of a text, or of a dotted path; a config has ten
_MOST_BITS = 1024  # of a whole number; Python cannot write one of some thousand digits
_DEFAULT_KINDS = {"noise": "geometric", "loss": "dsm"}  # of sections without `kind`
DECIDING = ("name", "seed", "data", "noise", "network", "loss", "optimizer", "train")
# What a model does not say, which somebody else may have made: where work runs, what is written where, and who is asked
# with this side's passwords.
_OF_MODELS = (*DECIDING, "sampling", "export")
NOT_OF_MODELS = (*(name for name in Config.model_fields if name not in _OF_MODELS), "export.out")
# What the record of a run does not say, since more people may write to a store than may use this side's passwords: each
# with the variables of the environment that say it instead.
ADDRESSES: Mapping[str, Sequence[str]] = {
    "compute.kuberay.image": [IMAGE_VARIABLE],
    "compute.kuberay.namespace": [],
    "compute.ray_jobs.address": RAY_VARIABLES,
    "tracking.uri": ["MLFLOW_TRACKING_URI"],
}


class _Strict(yaml.SafeLoader):
    """Refuses a key that appears twice, of which YAML would silently take the last, aliases and deep nesting.

    By aliases a text of a few hundred bytes holds millions of values.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias, which is not accepted: write the value", problem_mark=mark)
        if self._depth >= _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {_DEEPEST} levels of values", problem_mark=mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    found = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in found:
                problem = f"the key {shown_value(key.value)} appears twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            found.add(key.value)
    return loader.construct_mapping(node, deep=True)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    number: int = loader.construct_yaml_int(node)
    if number.bit_length() > _MOST_BITS:
        raise yaml.MarkedYAMLError(problem="a number of too many digits", problem_mark=node.start_mark)
    return number


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Strict.add_constructor("tag:yaml.org,2002:int", _integer)


def read_yaml(text: str) -> Any:
    """The value of a YAML or JSON text; `InvalidValue` if it is none, or repeats keys, has aliases or is too deep."""
    try:
        return yaml.load(text, Loader=_Strict)  # noqa: S506 (a SafeLoader)
    # PyYAML says so with any of the others of a number, a date or a value of a wrong kind.
    except (yaml.YAMLError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise InvalidValue(f"not valid YAML: {error}") from None


def from_yaml(
    text: str, *, overrides: Sequence[str] = (), origin: str = "config", without: Collection[str] = ()
) -> Config:
    """The config in a YAML or JSON text, after `overrides` like `a.b=value`, see `parse_override`.

    What the text says of the sections and settings `without` is not read: `NOT_OF_MODELS` or `ADDRESSES` of what others
    may have written. `ConfigError` with each wrong key or value, which says whether that is of the text, by its
    `origin`, or of `--set`.
    """
    return _parsed(text, tuple(overrides), origin, tuple(without))


# One `ncsn run` reads the same few texts again and again: those of the run, and of a checkpoint in each step.
@lru_cache(maxsize=32)
def _parsed(text: str, overrides: tuple[str, ...], origin: str, without: tuple[str, ...]) -> Config:
    try:
        tree = read_yaml(text)
    except InvalidValue as error:
        raise ConfigError(origin, str(error)) from None
    if tree is None:
        raise ConfigError(origin, "the file is empty" if origin != "config" else "the config is empty")
    if not isinstance(tree, dict):
        raise ConfigError(origin, "expected a mapping of sections")
    for path in without:
        _drop(tree, path)
    try:
        for override in overrides:
            set_value(tree, *parse_override(override))
        if tree.get("noise") == "auto":
            tree["noise"] = {"kind": "auto"}
        for section, kind in _DEFAULT_KINDS.items():
            if isinstance(tree.get(section), dict):
                tree[section] = {"kind": kind, **tree[section]}
        config, found = checked(tree), list[Problem]()
        if config.search is not None:
            from ncsn.config.search import space_problems  # here, so that others do not load it

            found = space_problems(config)
    except ConfigError as error:
        found = list(error.problems)
    if not found:
        return config
    own = found
    if overrides:
        try:
            own = []
            _parsed(text, (), "", without)
        except ConfigError as error:
            own = list(error.problems)
    at_fault = [origin if each in own else "--set" * (each.key != "--set") for each in found]
    raise ConfigError.of(replace(each, origin=where) for each, where in zip(found, at_fault, strict=True))


def _drop(tree: dict[str, Any], path: str) -> None:
    *sections, name = path.split(".")
    node: Any = tree
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(name, None)


def to_json(config: Config) -> str:
    """Canonical text with sorted keys and no spaces: the same for equal configs."""
    return json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def to_yaml(config: Config, *, without: Collection[str] = ()) -> str:
    """Readable text in the order of the schema, without these sections and settings."""
    tree = config.model_dump(mode="json")
    for path in without:
        _drop(tree, path)
    return yaml.safe_dump(tree, sort_keys=False)


def parse_override(override: str) -> tuple[str, Any]:
    """Dotted path and value of `a.b=value`; `ConfigError` if it is none.

    A value is YAML. That of a setting which is text is this text, such as no, null or 2024, unless it is in quotes or a
    mapping where one may be; null and nothing are None for one that may be null.
    """
    path, equals, raw = override.partition("=")
    path, text = path.strip(), raw.strip()
    if not equals or not all(path.split(".")) or path.count(".") >= _DEEPEST:
        raise ConfigError("--set", "expected a.b=value", hint="for example noise.num_levels=50", value=override)
    quoted, types = text.startswith(("'", '"')), types_at(path, Config)
    mapping = text.startswith("{") and is_mapping(path, Config)
    if str in types and not quoted and not mapping:
        return path, None if NoneType in types and text in ("", "~", "null") else text
    try:
        value = read_yaml(text)
    except InvalidValue:
        raise ConfigError(path.strip(), "not valid YAML", value=raw) from None
    # YAML 1.1 reads 1e-3, without a dot, as text.
    if isinstance(value, str) and not quoted:
        with suppress(ValueError):
            value = float(value)
    return path, value


def overrides_between(one: Config, other: Config) -> list[str]:
    """The `overrides` that make the other config of the text of one, of which the `ADDRESSES` are not read."""

    def changes(left: Any, right: Any, path: str) -> Iterator[str]:
        sections = isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys()
        if sections and not is_mapping(path, Config):
            for key, value in right.items():
                yield from changes(left[key], value, f"{path}.{key}" if path else key)
        elif left != right or (path in ADDRESSES and left is not None):
            yield f"{path}={json.dumps(right, ensure_ascii=False)}"  # of YAML, whose escapes have other surrogates

    return list(changes(one.model_dump(mode="json"), other.model_dump(mode="json"), ""))


_NOT_DECIDING = (
    "data.root",
    "data.follow_links",
    "data.download",
    *(f"data.{name}" for name in TERMS),
    "train.report_every_images",
    "train.keep_checkpoints",
    "train.checkpoint_every_images",
)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted path -> plain value; lists, and mappings by names of the user, stay what they are."""
    return dict(leaves(config))


def continues(config: Config) -> bool:
    """Whether a training may go on after train.num_images, of which nothing before depends on it."""
    scheduled = config.optimizer.decay != "constant" or config.loss.scheduled
    return not scheduled and config.search is None  # whose rungs are shares of it


def decay_begins(config: Config) -> int | None:
    """Images seen where a linear decay begins, in whole batches, as far as nothing before depends on the length."""
    settings, train = config.optimizer, config.train
    if settings.decay != "linear" or config.loss.scheduled or config.search is not None:
        return None
    first = train.num_images - (settings.decay_images or train.num_images / 3)
    return math.ceil(first / train.batch_size) * train.batch_size or None


def training_settings(config: Config) -> dict[str, Any]:
    """The settings that decide the weights, dotted path -> value. A run belongs to one choice of these."""
    # Not where data and work are, nor how often something is kept or reported.
    left_out = {*_NOT_DECIDING, *(["train.num_images"] if continues(config) else [])}
    return {
        path: value
        for path, value in flatten(config).items()
        if path.split(".")[0] in DECIDING and path not in left_out
    }


def changed_settings(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """The `training_settings` that differ: dotted path -> (value in one, value in other)."""
    # Noise levels are not compared if one config leaves their choice to the images.
    left, right = training_settings(one), training_settings(other)
    if continues(one) or continues(other):
        left, right = ({**settings, "train.num_images": None} for settings in (left, right))
    chosen_later = one.noise.kind != other.noise.kind and one.noise.training == other.noise.training
    return {
        path: (left.get(path), right.get(path))
        for path in sorted(left.keys() | right.keys())
        if left.get(path) != right.get(path) and not (chosen_later and path.startswith("noise."))
    }


def explain_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """The first of the `changed_settings` in words; `there` is one, `here` the other."""

    def words(value: Any) -> str:
        return "not set" if value is None else shown_value(value)

    first = "; ".join(
        f"{path} is {words(old)} there and {words(new)} here" for path, (old, new) in list(changed.items())[:3]
    )
    return first + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
