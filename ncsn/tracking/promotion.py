"""Who is champion: the ledger in the registry, the gate, promotion and rollback by hand.

MLflow has no "set this alias if it still points there". What it does atomically is to number versions: of two that are
created at once one gets the lower number. So each promotion is a version of the companion model `<name>.promotions`,
which names the promotion that it follows. It holds if that one is still the last; of two that follow the same, the
later number is void, and its author looks again at who is champion. The alias is then pointed to the last promotion.
No lock is held, so none is left behind by a process that is killed: whoever looks next finishes what it began.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

from ncsn.errors import UserError
from ncsn.tracking.gate import (
    Author,
    Decision,
    Evidence,
    Measurement,
    decide,
    decision_record,
    decision_tags,
)
from ncsn.tracking.versions import (
    CHALLENGER,
    CHAMPION,
    LEDGER_SUFFIX,
    aliased_version,
    ensure_model,
    has_version,
    require_model,
    require_version,
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


def pass_gate(client: MlflowClient, *, name: str, version: str, evidence: Evidence) -> Decision:
    """Make the version `challenger`, and `champion` if it may replace the present one.

    The decision, its numbers and who was replaced become tags of the version. Asked again with the same evidence, it
    returns the recorded decision and changes nothing; stopped at any point and asked again, it completes what it began.
    """
    recorded = recorded_decision(client, name, version)
    if recorded is not None and recorded.evidence == evidence:
        return recorded
    set_alias(client, name=name, alias=CHALLENGER, version=version)
    begun = (made for made in _promotions_of(client, name, version) if made.evidence == evidence)
    decision = next(begun, None)
    while decision is None:
        last = settle(client, name)
        made = decide(evidence, version=version, champion=known_champion(client, name, last.version))
        if made.promoted and last.version != version:
            written = json.dumps(asdict(made))
            if not promote(client, name, version, after=last, by="gate", reason=made.reason, decision=written):
                continue  # another pipeline promoted at the same moment: compare with that one
        decision = made
    settle(client, name)  # what was begun may lack its alias
    tag_version(client, name, version, decision_tags(decision))
    return decision


def recorded_decision(client: MlflowClient, name: str, version: str) -> Decision | None:
    """The decision that a version's tags hold; None if there is none, or one of a version 0.1.0 without uncertainty."""
    written = client.get_model_version(name, version).tags.get("gate.decision")
    values = json.loads(written) if written else {}
    return Decision.from_plain(values) if "evidence" in values else None


def _promotions_of(client: MlflowClient, name: str, version: str) -> list[Decision]:
    """The decisions by which the gate promoted a version, as the ledger has them, latest first.

    It has them before the version's tags: its process may have been stopped in between.
    """
    entries = reversed(history(client, name))
    written = (entry.decision for entry in entries if entry.version == version and entry.decision)
    return [Decision.from_plain(json.loads(text)) for text in written]


def known_champion(client: MlflowClient, name: str, version: str) -> tuple[str, Measurement | None] | None:
    """A champion and its figure, for `decide`; None for no version."""
    if not version:
        return None
    known = recorded_decision(client, name, version) or next(iter(_promotions_of(client, name, version)), None)
    return version, None if known is None or known.evidence is None else known.evidence.measurement


@dataclass(frozen=True)
class AliasChange:
    """What `ncsn promote` or `ncsn rollback` did, or would do.

    Attributes:
        model: Registered model.
        version: The champion now.
        replaced: The champion before; empty if there was none.
        reason: Why.
        changed: Whether the alias moved.
        dry_run: Whether it was only asked what would happen.
    """

    model: str
    version: str
    replaced: str
    reason: str
    changed: bool
    dry_run: bool


def promote_version(
    client: MlflowClient, name: str, *, version: str | None = None, force: bool = False, dry_run: bool = False
) -> AliasChange:
    """Ask the gate again about a version that is registered, and make it champion if it may.

    The decision leaves the tags and the artifact `gate.json` that one of the register step leaves.

    Args:
        client: Of the registry.
        name: Registered model.
        version: Which one; the challenger if None.
        force: Make it champion whatever the gate says.
        dry_run: Change nothing.

    Raises:
        UserError: for an unknown model or version, or if the gate refuses.
    """
    require_model(client, name)
    chosen = version or _challenger(client, name)
    require_version(client, name, chosen)
    recorded = recorded_decision(client, name, chosen)
    evidence = None if recorded is None else recorded.evidence
    while True:
        last = None if dry_run else settle(client, name)
        champion = champion_version(client, name) if last is None else last.version
        if champion == chosen:
            if last is not None and last.by == "hand" and last.decision:
                _leave(client, name, chosen, Decision.from_plain(json.loads(last.decision)))
            return AliasChange(name, chosen, chosen, "it is the champion already", changed=False, dry_run=dry_run)
        decision = _asked_again(client, name, chosen, evidence, champion)
        if not decision.promoted and not force:
            raise UserError(
                f"models:/{name}/{chosen}", f"not promoted: {decision.reason}", hint="--force promotes it anyway"
            )
        if not decision.promoted:
            decision = replace(decision, promoted=True, reason=f"promoted by hand although {decision.reason}")
        if last is None or _promoted(client, name, chosen, last, decision):
            return AliasChange(name, chosen, champion, decision.reason, changed=True, dry_run=dry_run)


def roll_back(client: MlflowClient, name: str, *, dry_run: bool = False) -> AliasChange:
    """Make the champion before the present one champion again.

    Raises:
        UserError: for an unknown model, or if no earlier champion is on record.
    """
    require_model(client, name)
    while True:
        last = None if dry_run else settle(client, name)
        champion = champion_version(client, name)
        previous = previous_champion(client, name)
        if not champion or previous is None:
            what = f"version {champion} is the first champion" if champion else "there is no champion"
            raise UserError(
                f"models:/{name}@{CHAMPION}",
                f"{what}, so there is none to go back to",
                hint=f"choose one with `ncsn promote {name} --version N`",
            )
        reason = f"rolled back from version {champion}"
        if last is not None:
            if not promote(client, name, previous, after=last, by="rollback", reason=reason):
                continue
            now = datetime.now(UTC).isoformat(timespec="seconds")
            tag_version(client, name, champion, {"rolled_back_at": now, "rolled_back_to": previous})
        return AliasChange(name, previous, champion, reason, changed=True, dry_run=dry_run)


def _asked_again(client: MlflowClient, name: str, version: str, evidence: Evidence | None, champion: str) -> Decision:
    known = known_champion(client, name, champion)
    if evidence is not None:
        return decide(evidence, version=version, champion=known)
    reason = "it has no figure with an uncertainty on record; evaluate and register its run again"
    return Decision(False, reason, None, *(known or ()))


def _promoted(client: MlflowClient, name: str, version: str, last: Promotion, decision: Decision) -> bool:
    """Promote after `last` and leave what the gate leaves; False if another promotion came between."""
    written = json.dumps(asdict(decision))
    if not promote(client, name, version, after=last, by="hand", reason=decision.reason, decision=written):
        return False
    _leave(client, name, version, decision)
    return True


def _leave(client: MlflowClient, name: str, version: str, decision: Decision) -> None:
    """Write artifact and tags, unless they are there: a process that was stopped may have left some."""
    if recorded_decision(client, name, version) == decision:
        return
    if run_id := client.get_model_version(name, version).run_id:
        client.log_dict(run_id, decision_record(decision, name=name, version=version, by="hand"), "gate.json")
    tag_version(client, name, version, decision_tags(decision))


def _challenger(client: MlflowClient, name: str) -> str:
    found = aliased_version(client, name, CHALLENGER)
    if found is None:
        raise UserError(
            f"models:/{name}@{CHALLENGER}",
            "there is no challenger",
            hint=f"name the version: `ncsn promote {name} --version N`",
        )
    return str(found.version)
