"""Dotted paths: of values in a tree of settings, and of pydantic's errors as problems."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ncsn.core.samplers.settings import Sampler
from ncsn.errors import ConfigError, Problem, problems_of, shown_value


def leaves(config: BaseModel) -> Iterator[tuple[str, Any]]:
    """The dotted path of each setting, and its plain value, which may be a list or a mapping by names of the user."""

    def below(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            path = f"{prefix}{key}"
            if isinstance(value, dict) and not is_mapping(path, type(config)):
                yield from below(value, f"{path}.")
            else:
                yield path, value

    return below(config.model_dump(mode="json"), "")


def is_mapping(path: str, root: type[Any]) -> bool:
    """Whether the value at a dotted path may be a mapping whose keys are no settings, such as names of classes."""
    return any(get_origin(each) is dict for each in types_at(path, root))


def set_value(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path, making its sections, of null too; `ConfigError` if one of them is a value."""
    *sections, last = path.split(".")
    node = tree
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(path, f"{section!r} is a value, not a section")
    node[last] = value


_MOST = 20  # problems of a text that are told


def problems(error: ValidationError, tree: dict[str, Any], *, model: type[Any]) -> list[Problem]:
    """The first problems of a tree that is not a valid `model`."""
    return [problem for detail in error.errors()[:_MOST] for problem in _explain(detail, tree, model)]


def fields_of(section: type[Any]) -> Mapping[str, FieldInfo]:
    """The settings of a section, a model here or a dataclass of `ncsn.core`."""
    if issubclass(section, BaseModel):
        return section.model_fields
    return _dataclass_fields(section)  # type: ignore[arg-type] # mypy: no class is hashable


@cache
def _dataclass_fields(section: type[Any]) -> Mapping[str, FieldInfo]:
    hints, described = get_type_hints(section, include_extras=True), TypeAdapter(section).json_schema()["properties"]
    return {
        field.name: FieldInfo.from_annotated_attribute(
            hints[field.name],
            Field(... if field.default is MISSING else field.default, description=described[field.name]["description"]),
        )
        for field in fields(section)
    }


def section_models(model: type[Any], field: str) -> list[type[Any]]:
    """The section classes that a field may hold, alone or in a mapping; none for a value."""

    def within(annotation: Any) -> Iterator[type[Any]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel | Sampler):
            yield annotation
        for arm in get_args(annotation):
            yield from within(arm)

    return list(within(fields_of(model)[field].annotation))


def types_at(path: str, root: type[Any]) -> list[Any]:
    """What the value at a dotted path may be, whatever the kinds of its sections: types, sections and `Literal`s."""
    found: list[Any] = [root]
    for key in path.split("."):
        models = [each for each in found if isinstance(each, type) and issubclass(each, BaseModel | Sampler)]
        below = [fields_of(model)[key].annotation for model in models if key in fields_of(model)]
        below += [get_args(each)[1] for each in found if get_origin(each) is dict]
        found = []
        while below:
            if get_origin(each := below.pop(0)) in (Union, UnionType, Annotated):
                below = [*get_args(each), *below]
            else:
                found.append(each)
    return found


def kinds_of(models: Iterable[type[Any]]) -> list[str]:
    """The values of `kind` that these sections have; none for a section without it."""
    found = [fields_of(model).get("kind") for model in models]
    return [kind for field in found if field is not None for kind in get_args(field.annotation)]


def _explain(detail: ErrorDetails, tree: dict[str, Any], model: type[Any]) -> list[Problem]:
    parts: list[str] = []
    node: Any = tree
    for part in detail["loc"]:
        if isinstance(node, dict) and part not in node and node.get("kind") == part:
            continue  # pydantic adds the tags of discriminated unions to the location
        parts.append(str(part))
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
    path = ".".join(parts)
    kind, value = detail["type"], detail["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        valid = sorted({key for section in _models(parts, tree, model) for key in fields_of(section)})
        close = difflib.get_close_matches(parts[-1], valid, n=1, cutoff=0.75)
        hint = f"did you mean {close[0]!r}? " if close else _other_kinds(parts, model)
        return [Problem(path, "unknown key", f"{hint}valid keys: {', '.join(valid)}")]
    if kind == "missing":
        return [Problem(path, "missing", "set it; it has no default")]
    if kind == "union_tag_not_found":
        kinds = kinds_of(_models([*parts, "kind"], tree, model))
        return [Problem(f"{path}.kind", "missing", f"valid: {', '.join(kinds)}")]
    if kind == "union_tag_invalid":
        return [Problem(f"{path}.kind", f"not one of {detail['ctx']['expected_tags']}", value=detail["ctx"]["tag"])]
    if kind == "literal_error":
        return [Problem(path, f"not one of {detail['ctx']['expected'].replace(' or ', ', ')}", value=value)]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        kinds = kinds_of(_models([*parts, "kind"], tree, model))
        example = f", such as {{kind: {kinds[0]}, ...}}" if kinds else ""
        return [Problem(path, f"expected a mapping{example}", value=value)]
    if kind == "string_type":
        return [Problem(path, "is no text", "put it in quotes, in which YAML leaves it as it is", value)]
    if kind == "tuple_type":
        return [Problem(path, "is no list", f"write one, as {path}=[{shown_value(value)}]", value)]
    if kind == "value_error":
        raised: ValueError = detail["ctx"]["error"]
        if not (found := problems_of(raised)):  # a bug
            raise raised
        # The keys of a validator's UserError are relative to its section.
        return [replace(problem, key=".".join(filter(None, (path, problem.key)))) for problem in found]
    return [Problem(path, f"{detail['msg'][0].lower()}{detail['msg'][1:]}", value=value)]


def _other_kinds(parts: Sequence[str], root: type[Any]) -> str:
    """A hint if the last of `parts` is a key of the same section with another `kind`; else nothing."""
    *section, key = parts
    # An empty tree has no kinds, so that the section may have any.
    kinds = kinds_of(arm for arm in _models(parts, {}, root) if key in fields_of(arm))
    if not kinds:
        return ""
    path = ".".join(section)
    return f"it is for kind {' or '.join(kinds)}; to change the kind, replace the section: {path}={{kind: ...}}; "


def _models(parts: Sequence[str], tree: dict[str, Any], root: type[Any]) -> list[type[Any]]:
    """The sections that may hold the last of `parts`."""
    models: list[type[Any]] = [root]
    node: Any = tree
    for part in parts[:-1]:
        if isinstance(node, list) and part.isdigit():
            node = node[int(part)]
            continue
        node = node.get(part) if isinstance(node, dict) else None
        kind = node.get("kind") if isinstance(node, dict) else None
        named = [model for model in models if part in fields_of(model)]
        # A part that is not a field is a key of a mapping of sections.
        arms = [arm for model in named for arm in section_models(model, part)] if named else models
        models = [arm for arm in arms if kind in kinds_of([arm])] or arms
    return models
