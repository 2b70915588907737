"""What a run took, beside what it was planned to take, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ncsn.report.page import Fact

MINUTE, HOUR, DAY = 60, 3600, 86400


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min`, `2.1 h` or `4.0 days`."""
    if seconds < 2 * MINUTE:
        return f"{seconds:,.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:,.1f} min"
    return f"{seconds / HOUR:,.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:,.1f} days"


def cost_line(ledger: Mapping[str, Any]) -> str:
    """The whole run in one line; empty if no step has an account."""
    actual = ledger["actual"]
    return _words(actual["total"], ledger["prices"]["currency"]) if actual["steps"] else ""


def cost_facts(ledger: Mapping[str, Any], *, num_images: int) -> Iterator[Fact]:
    """What the steps took together, what was planned, and what images cost that are made after training.

    Args:
        ledger: As `ncsn.runs.costs.ledger` gives it.
        num_images: Images that the sample step made.
    """
    currency, steps = ledger["prices"]["currency"], ledger["actual"]["steps"]
    if not steps:
        return
    yield Fact("Taken", _words(ledger["actual"]["total"], currency))
    if ledger["plan"] is not None:
        yield Fact("Planned", _words(ledger["plan"]["total"], currency))
    if "sample" in steps and num_images:
        share = 1000 / num_images
        per_thousand = {name: share * value for name, value in steps["sample"].items()}
        yield Fact("Per 1,000 images", _words(per_thousand, currency))


def _words(cost: Mapping[str, float], currency: str) -> str:
    gpu = f" · {cost['gpu_hours']:,.2g} GPU hours" if cost["gpu_hours"] else ""
    return (
        f"{duration(cost['seconds'])} · {cost['cpu_hours']:,.2g} CPU hours{gpu} · {cost['money']:,.2g} {currency} · "
        f"{cost['kwh']:,.2g} kWh"
    )
