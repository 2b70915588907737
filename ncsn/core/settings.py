"""Settings that are checked when they are made: frozen dataclasses, which are also sections of the config.

A subclass annotates each field with its range and describes it in a string below it. Nothing here imports torch.
"""

from __future__ import annotations

import operator
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from ncsn.errors import UserError

_BOUNDS = {
    "gt": (operator.gt, "more than"),
    "ge": (operator.ge, "at least"),
    "lt": (operator.lt, "less than"),
    "le": (operator.le, "at most"),
}


class Settings:
    """A frozen dataclass of settings; `UserError` with the name of a field whose value is out of its range."""

    # Read by pydantic where the config has this section.
    __pydantic_config__: ClassVar[Any] = {
        "use_attribute_docstrings": True,
        "extra": "forbid",
        "allow_inf_nan": False,
    }

    def __post_init__(self) -> None:
        for name, (base, bounds) in _ranges(type(self)).items():  # type: ignore[arg-type] # mypy: no class is hashable
            value = getattr(self, name)
            if get_origin(base) is Literal and value not in get_args(base):
                raise UserError(name, f"must be one of {', '.join(map(str, get_args(base)))}", value=value)
            for words, compare, bound in bounds:
                if value is not None and not compare(value, bound):
                    raise UserError(name, f"must be {words} {bound:g}", value=value)


@cache
def _ranges(settings: type[Settings]) -> dict[str, tuple[Any, list[tuple[str, Any, float]]]]:
    """Field -> its type and bounds."""
    hints = get_type_hints(settings, include_extras=True)
    found = {}
    for field in fields(settings):  # type: ignore[arg-type]
        hint = hints[field.name]
        base, *rules = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        bounds = [
            (words, compare, getattr(rule, name))
            for rule in rules
            for name, (compare, words) in _BOUNDS.items()
            if hasattr(rule, name)
        ]
        found[field.name] = base, bounds
    return found
