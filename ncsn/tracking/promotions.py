"""Who is champion, decided one promotion at a time by a ledger in the registry.

MLflow has no "set this alias if it still points there". What it does atomically is to number versions: of two that are
created at once one gets the lower number. So each promotion is a version of the companion model `<name>.promotions`,
which names the promotion that it follows. It holds if that one is still the last; of two that follow the same, the
later number is void, and its author looks again at who is champion. The alias is then pointed to the last promotion.
No lock is held, so none is left behind by a process that is killed: whoever looks next finishes what it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, cast

from ncsn.tracking.versions import (
    CHAMPION,
    LEDGER_SUFFIX,
    aliased_version,
    ensure_model,
    has_version,
    set_alias,
    tag_version,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

_LEDGER_DESCRIPTION = (
    "The promotions of {name}, in order. Each version is one promotion and points to the version of {name} that became "
    "champion. Written by `ncsn`; it decides who is champion when two promote at once, and what a rollback returns to."
)

Author = Literal["gate", "hand", "alias", "rollback", ""]


@dataclass(frozen=True)
class Promotion:
    """One entry of the ledger.

    Attributes:
        number: Its place; 0 stands for the beginning, when there is no champion.
        version: The version that became champion; empty if there is none.
        replaced: The champion before; empty if there was none.
        by: `gate`, `hand` (`ncsn promote`), `alias` (found that the alias had been moved in MLflow), `rollback`.
        reason: Why, one sentence.
        at: When, ISO 8601.
        decision: The gate's decision as JSON; empty if it was not asked.
        applied: Whether the alias has pointed there.
    """

    number: int = 0
    version: str = ""
    replaced: str = ""
    by: Author = ""
    reason: str = ""
    at: str = ""
    decision: str = ""
    applied: bool = True


def history(client: MlflowClient, name: str) -> list[Promotion]:
    """The promotions that hold, oldest first."""
    found = client.search_model_versions(f"name = '{name}{LEDGER_SUFFIX}'")
    entries: list[Promotion] = []
    for entry in sorted(found, key=lambda entry: int(entry.version)):
        last = entries[-1].number if entries else 0
        if int(entry.tags["promotion.after"]) == last:
            entries.append(_from_entry(entry))
    return entries


def champion_version(client: MlflowClient, name: str) -> str:
    """The version that the alias points to; empty if there is none."""
    version = aliased_version(client, name, CHAMPION)
    return "" if version is None else str(version.version)


def settle(client: MlflowClient, name: str) -> Promotion:
    """The last promotion, with alias and tags as it says; its `version` is empty if there is no champion.

    An alias that somebody moved in MLflow becomes a promotion of its own; one that was removed means no champion.
    """
    moved = False
    while True:
        last = (history(client, name) or [Promotion()])[-1]
        champion = champion_version(client, name)
        if champion == last.version:
            _finish(client, name, last)
            return last
        if last.applied and not moved:
            if not champion:
                return replace(last, version="")
            reason = "the alias was set in MLflow"
            _append(client, name, replace(last, version=champion, replaced=last.version, by="alias", reason=reason))
        elif has_version(client, name, last.version):
            set_alias(client, name=name, alias=CHAMPION, version=last.version)
            moved = True
        else:
            _finish(client, name, last)


def promote(
    client: MlflowClient, name: str, version: str, *, after: Promotion, by: Author, reason: str, decision: str = ""
) -> bool:
    """Make a version champion in place of that of `after`; False if another promotion came between.

    Args:
        client: Of the registry.
        name: Registered model.
        version: The new champion.
        after: What `settle` returned; the decision was made on it.
        by: See `Promotion`.
        reason: Why, one sentence.
        decision: See `Promotion`.
    """
    entry = replace(after, version=version, replaced=after.version, by=by, reason=reason, decision=decision)
    if not _append(client, name, entry):
        return False
    settle(client, name)
    return True


def previous_champion(client: MlflowClient, name: str) -> str | None:
    """The version that a rollback returns to; None if none is on record.

    The champions are a stack: a promotion lays one on top, a rollback takes away what lies above its own.
    """
    stack: list[str] = []
    for entry in history(client, name):
        if entry.by == "rollback" and entry.version in stack:
            del stack[stack.index(entry.version) + 1 :]
        else:
            stack = [version for version in stack if version != entry.version] + [entry.version]
    present = champion_version(client, name)
    return next((one for one in reversed(stack) if one != present and has_version(client, name, one)), None)


def _append(client: MlflowClient, name: str, entry: Promotion) -> bool:
    """Write `entry` to follow the promotion that has its number; False if another one followed that first."""
    ledger = f"{name}{LEDGER_SUFFIX}"
    ensure_model(client, ledger, description=_LEDGER_DESCRIPTION.format(name=name))
    created = client.create_model_version(
        ledger,
        f"models:/{name}/{entry.version}",
        tags={
            "promotion.after": str(entry.number),
            "promotion.version": entry.version,
            "promotion.replaced": entry.replaced,
            "promotion.by": entry.by,
            "promotion.reason": entry.reason,
            "promotion.at": datetime.now(UTC).isoformat(timespec="seconds"),
            "promotion.decision": entry.decision,
        },
        description=f"Version {entry.version} of {name}: {entry.reason}",
    )
    holds = any(held.number == int(created.version) for held in history(client, name))
    if not holds:
        client.delete_model_version(ledger, created.version)
    return holds


def _finish(client: MlflowClient, name: str, last: Promotion) -> None:
    """Write what else follows from a promotion, once the alias points there."""
    if last.applied:
        return
    tags: Mapping[str, str] = {
        "promoted_at": last.at,
        "promoted_from": last.replaced,
        "promoted_by": last.by,
        "promotion.reason": last.reason,
    }
    found_as_it_is = last.by == "alias" and not last.replaced  # promoted before there was a ledger
    if has_version(client, name, last.version) and not found_as_it_is:
        tag_version(client, name, last.version, tags)
    tag_version(client, f"{name}{LEDGER_SUFFIX}", str(last.number), {"promotion.applied": "true"})


def _from_entry(entry: ModelVersion) -> Promotion:
    tags = entry.tags
    return Promotion(
        number=int(entry.version),
        version=tags["promotion.version"],
        replaced=tags["promotion.replaced"],
        by=cast("Author", tags["promotion.by"]),
        reason=tags["promotion.reason"],
        at=tags["promotion.at"],
        decision=tags["promotion.decision"],
        applied="promotion.applied" in tags,
    )
