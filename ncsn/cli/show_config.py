"""The resolved config as YAML in which every field carries its meaning and range."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ncsn.config import Config
from ncsn.config.problems import section_models

_WIDTH = 118
_INDENT = "  "


def documented_yaml(config: Config) -> str:
    """Valid YAML that parses to `config`, each value under a comment with its description, range and default."""
    return "\n".join([*_comment(_first_line(type(config)), ""), *_section(config, ""), ""])


def _section(section: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            if not indent:
                yield ""
            yield from _comment(_first_line(type(value)) + _other_kinds(type(section), name, value), indent)
            yield f"{indent}{name}:"
            yield from _section(value, indent + _INDENT)
        else:
            yield from _comment(_meaning(field), indent)
            yield f"{indent}{name}: {_scalar(value)}"


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or model.__name__).strip().splitlines()[0]


def _other_kinds(section: type[BaseModel], name: str, value: BaseModel) -> str:
    kinds = [kind for model in section_models(section, name) if "kind" in model.model_fields for kind in _kinds(model)]
    others = [kind for kind in kinds if kind != getattr(value, "kind", None)]
    return f" Other kinds, with settings of their own: {', '.join(others)}." if others else ""


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation)


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _scalar(value: Any) -> str:
    text: str = yaml.safe_dump(_plain(value), default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _meaning(field: FieldInfo) -> str:
    limits = [*_limits(field), *([] if field.is_required() else [f"default {_scalar(field.default)}"])]
    return f"{field.description} [{'; '.join(limits)}]" if limits else str(field.description)


def _limits(field: FieldInfo) -> Iterator[str]:
    choices = _choices(field.annotation)
    if choices:
        yield "one of " + ", ".join(_scalar(choice) for choice in choices)
    for limit in field.metadata:
        match limit:
            case annotated_types.Ge(ge):
                yield f">= {ge}"
            case annotated_types.Gt(gt):
                yield f"> {gt}"
            case annotated_types.Le(le):
                yield f"<= {le}"
            case annotated_types.Lt(lt):
                yield f"< {lt}"
            case annotated_types.MinLen(min_length):
                yield f"at least {min_length} long"
            case annotated_types.MaxLen(max_length):
                yield f"at most {max_length} long"


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(choice for arm in get_args(annotation) for choice in _choices(arm))
    return ()
