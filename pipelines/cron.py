"""Schedules as people write them, five fields or six, in the form that KFP takes: six, seconds first."""

from __future__ import annotations

import re

from ncsn.errors import UserError

_FIELDS = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")),
    ("day of week", 0, 6, ("sun", "mon", "tue", "wed", "thu", "fri", "sat")),
)
_SHORTHANDS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_ITEM = re.compile(r"(?P<first>\*|\?|\w+)(?:-(?P<last>\w+))?(?:/(?P<step>\d+))?")


def kfp_schedule(expression: str) -> str:
    """The schedule for KFP, whose clock is UTC.

    Args:
        expression: `minute hour day month weekday`, the same with seconds before it, or one of `@hourly`, `@daily`,
            `@weekly`, `@monthly` and `@yearly`.

    Raises:
        UserError: for a field that no clock can meet.
    """
    text = expression.strip()
    if text in _SHORTHANDS:
        return text
    parts = text.split()
    if len(parts) == len(_FIELDS) - 1:
        parts = ["0", *parts]
    if len(parts) != len(_FIELDS):
        raise UserError(
            "--every",
            f"a schedule of {len(parts)} fields",
            hint="write five, 'minute hour day month weekday', as in '0 3 * * 1' for Mondays at 03:00 UTC, or one of "
            f"{', '.join(_SHORTHANDS)}",
            value=expression,
        )
    for part, (name, low, high, words) in zip(parts, _FIELDS, strict=True):
        if not all(_possible(item, low, high, words) for item in part.split(",")):
            raise UserError(
                "--every",
                f"{part!r} is not a {name}",
                hint=f"use {low} to {high}, '*', a range such as {low}-{high}, or a step such as */2",
                value=expression,
            )
    return " ".join(parts)


def _possible(item: str, low: int, high: int, words: tuple[str, ...]) -> bool:
    match = _ITEM.fullmatch(item)
    if match is None or match["step"] == "0":
        return False
    if match["first"] in ("*", "?"):
        return match["last"] is None
    ends = [_number(end, low, words) for end in (match["first"], match["last"]) if end is not None]
    return all(end is not None and low <= end <= high for end in ends) and ends == sorted(
        ends, key=lambda end: end or 0
    )


def _number(text: str, low: int, words: tuple[str, ...]) -> int | None:
    if text.isdecimal():
        return int(text)
    return words.index(text.lower()) + low if text.lower() in words else None
