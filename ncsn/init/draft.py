"""Configs as commented YAML: one in the making, with the reason for each value, and any, with each value's meaning."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from ncsn.config import Config, from_yaml
from ncsn.config.load import parse_override
from ncsn.config.problems import fields_of, kinds_of, section_models, set_value
from ncsn.core.samplers.settings import Sampler

# Attributes of `annotated_types`, whose classes have one each.
_LIMITS = {
    "ge": ">= {}",
    "gt": "> {}",
    "le": "<= {}",
    "lt": "< {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}
_WIDTH = 118
_INDENT = "  "


class Draft:
    """Settings by dotted path, each with a reason.

    What `--set` gives is not chosen: `choose` returns the given value, so that later choices fit it.
    """

    def __init__(self, overrides: Sequence[str] = ()) -> None:
        self.tree: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}
        self._given = dict(map(parse_override, overrides))
        for path, value in self._given.items():
            set_value(self.tree, path, value)
            self.reasons[path] = "As given."

    def choose(self, path: str, value: Any, reason: str = "") -> Any:
        """Set a value unless it is given; returns the one that holds."""
        if self._is_given(path):
            return self.get(path, value)
        set_value(self.tree, path, value)
        self.reasons[path] = reason
        return value

    def section(self, path: str, kind: str, reason: str = "") -> bool:
        """Choose the kind of a section; False if it, or another kind, is given: then choose nothing of it."""
        return not self._is_given(path) and self.choose(f"{path}.kind", kind, reason) == kind

    def get(self, path: str, default: Any = None) -> Any:
        node: Any = self.tree
        for key in path.split("."):
            if not isinstance(node, dict) or key not in node:
                return default
            node = node[key]
        return node

    def to_yaml(self, heading: Iterable[str] = ()) -> str:
        """The file: sections and their settings in the order of the schema, reasons as comments."""
        comments = [line for text in heading for line in _comment(text)]
        return "\n".join([*comments, *[""] * bool(comments), *self._lines(self.tree, "", Config), ""])

    def _is_given(self, path: str) -> bool:
        return any(path == given or path.startswith(f"{given}.") for given in self._given)

    def _lines(self, node: dict[str, Any], prefix: str, model: Any) -> Iterator[str]:
        # A section of several kinds has no one order.
        fields = getattr(model, "model_fields", {})
        places = {key: place for place, key in enumerate(fields)}
        indent = _INDENT * prefix.count(".")
        for key in sorted(node, key=lambda key: places.get(key, len(places))):
            path, value = f"{prefix}{key}", node[key]
            yield from _comment(self.reasons.get(path, ""), indent)
            if isinstance(value, dict) and value:
                yield f"{indent}{key}:"
                yield from self._lines(value, f"{path}.", fields[key].annotation if key in fields else None)
            else:
                yield f"{indent}{key}: {_scalar(value)}"


def any_config(*, overrides: Sequence[str] = (), train: Mapping[str, Any] | None = None, **sections: Any) -> Config:
    """A valid config with these sections; the others are a small network, a long training and some sampler."""
    never = dict.fromkeys(("num_images", "checkpoint_every_images", "report_every_images"), 10**9)
    others = {
        "name": "any",
        "network": {"kind": "unet", "widths": [8]},
        "train": {**never, **(train or {})},
        "sampling": {"sampler": {"kind": "annealed_langevin"}},
    }
    return from_yaml(json.dumps({**others, **sections}), overrides=overrides, origin="")


def _comment(text: str, indent: str = "") -> list[str]:
    """The lines of a YAML comment."""
    # Names of files may hold characters that end a line or that YAML refuses.
    plain = "".join(each if each.isprintable() else " " for each in text)
    return textwrap.wrap(plain, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _scalar(value: Any) -> str:
    """A plain value as YAML in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def documented_yaml(config: Config) -> str:
    """Valid YAML that parses to `config`, each value under a comment with its description, range and default."""
    return "\n".join([*_comment(_first_line(type(config))), *_section(config, ""), ""])


def _section(section: Any, indent: str) -> Iterator[str]:
    for name, field in fields_of(type(section)).items():
        value = getattr(section, name)
        if not indent and section_models(type(section), name):
            yield ""
        if isinstance(value, BaseModel | Sampler):
            text, own = _first_line(type(value)), getattr(value, "kind", None)
            if others := [kind for kind in kinds_of(section_models(type(section), name)) if kind != own]:
                text += f" Other kinds, with other settings: {', '.join(others)}."
            yield from _comment(text, indent)
            yield f"{indent}{name}:"
            yield from _section(value, indent + _INDENT)
        else:
            choices = ", ".join(map(_shown, _choices(field.annotation)))
            limits = [f"one of {choices}"] if choices else []
            for limit, (key, words) in itertools.product(field.metadata, _LIMITS.items()):
                if hasattr(limit, key):
                    limits.append(words.format(getattr(limit, key)))
            if not field.is_required():
                limits.append(f"default {_shown(field.default)}")
            yield from _comment(f"{field.description}" + (f" [{'; '.join(limits)}]" if limits else ""), indent)
            yield f"{indent}{name}: {_shown(value)}"


def _first_line(model: type[Any]) -> str:
    return (model.__doc__ or model.__name__).strip().splitlines()[0]


def _shown(value: Any) -> str:
    return _scalar(to_jsonable_python(value))


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(choice for arm in get_args(annotation) for choice in _choices(arm))
    return ()
