"""Which version is champion: the ledger in the registry, the gate, promotion and rollback by hand.

MLflow cannot set an alias only if it still points to a given version. What it does atomically is to number versions: of
two created at once one gets the lower number. So each promotion is a version of the companion model
`<name>.promotions` and names the promotion that it follows. It holds if that one is still the last; of two that follow
the same one the later number is void, and its author decides again with the new champion. The alias then points to the
last promotion. There is no lock, so a killed process leaves none behind: the next one completes what it began.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ncsn.errors import UserError
from ncsn.process import utc_now
from ncsn.tracking.gate import Author, Decision, Evidence, Measurement, decide, decision_record, decision_tags
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
    """One entry of the ledger."""

    number: int = 0  # its place; 0 is the beginning, without a champion
    version: str = ""  # the new champion; empty if there is none
    replaced: str = ""  # the champion before
    by: Author = ""  # "alias": found that the alias had been moved in MLflow
    reason: str = ""
    at: str = ""  # ISO 8601
    decision: str = ""  # the gate's, as JSON; empty if it was not asked
    applied: bool = True  # whether the alias has pointed there


_WRITTEN = ("version", "replaced", "by", "reason", "at", "decision")  # tags of an entry


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


def apply_last(client: MlflowClient, name: str) -> Promotion:
    """Bring alias and tags in line with the last promotion, and return it; its `version` is empty without a champion.

    An alias that was moved in MLflow becomes a promotion; a removed one means that there is no champion.
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
    client: MlflowClient, name: str, version: str, decision: Decision | str, *, after: Promotion, by: Author
) -> bool:
    """Make a version champion after the promotion `after`, which `apply_last` gave; False if another came between.

    `decision` is the gate's, or the reason if it was not asked.
    """
    if isinstance(decision, Decision):
        reason, written = decision.reason, json.dumps(asdict(decision))
    else:
        reason, written = decision, ""
    entry = replace(after, version=version, replaced=after.version, by=by, reason=reason, decision=written)
    if not _append(client, name, entry):
        return False
    apply_last(client, name)
    return True


def previous_champion(client: MlflowClient, name: str) -> str | None:
    """The version that a rollback returns to; None if none is on record."""
    # A promotion puts a champion on top of the stack, a rollback removes those above its own.
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
    written = asdict(replace(entry, at=utc_now()))
    created = client.create_model_version(
        ledger,
        f"models:/{name}/{entry.version}",
        tags={"promotion.after": str(entry.number), **{f"promotion.{field}": written[field] for field in _WRITTEN}},
        description=f"Version {entry.version} of {name}: {entry.reason}",
    )
    holds = any(held.number == int(created.version) for held in history(client, name))
    if not holds:
        client.delete_model_version(ledger, created.version)
    return holds


def _finish(client: MlflowClient, name: str, last: Promotion) -> None:
    """Tag the version and the entry, once the alias points there."""
    if last.applied:
        return
    found_as_it_is = last.by == "alias" and not last.replaced  # promoted before there was a ledger
    if has_version(client, name, last.version) and not found_as_it_is:
        tags = {"promoted_at": last.at, "promoted_from": last.replaced, "promoted_by": last.by}
        tag_version(client, name, last.version, tags | {"promotion.reason": last.reason})
    tag_version(client, f"{name}{LEDGER_SUFFIX}", str(last.number), {"promotion.applied": "true"})


def _from_entry(entry: ModelVersion) -> Promotion:
    written: dict[str, Any] = {field: entry.tags[f"promotion.{field}"] for field in _WRITTEN}
    return Promotion(number=int(entry.version), applied="promotion.applied" in entry.tags, **written)


def pass_gate(client: MlflowClient, *, name: str, version: str, evidence: Evidence) -> Decision:
    """Make the version `challenger`, and `champion` if it may replace the present one.

    The decision becomes tags of the version. With the same evidence again, the recorded decision is returned and
    nothing changes; interrupted at any point and called again, it completes what it began.
    """
    recorded = recorded_decision(client, name, version)
    if recorded is not None and recorded.evidence == evidence:
        return recorded
    set_alias(client, name=name, alias=CHALLENGER, version=version)
    begun = (made for made in _promotions_of(client, name, version) if made.evidence == evidence)
    decision = next(begun, None)
    while decision is None:
        last = apply_last(client, name)
        made = decide(evidence, version=version, champion=known_champion(client, name, last.version))
        stays = not made.promoted or last.version == version
        if stays or promote(client, name, version, made, after=last, by="gate"):
            decision = made  # else another pipeline promoted at the same moment: compare with its version
    apply_last(client, name)  # an interrupted promotion may lack its alias
    tag_version(client, name, version, decision_tags(decision))
    return decision


def recorded_decision(client: MlflowClient, name: str, version: str) -> Decision | None:
    """The decision in a version's tags; None if there is none, or one of ncsn 0.1.0, which had no uncertainty."""
    written = client.get_model_version(name, version).tags.get("gate.decision")
    values = json.loads(written) if written else {}
    return Decision.from_plain(values) if "evidence" in values else None


def _promotions_of(client: MlflowClient, name: str, version: str) -> list[Decision]:
    """The gate's promotions of a version, latest first, from the ledger, which has them before the version's tags."""
    entries = reversed(history(client, name))
    written = (entry.decision for entry in entries if entry.version == version and entry.decision)
    return [Decision.from_plain(json.loads(text)) for text in written]


def known_champion(client: MlflowClient, name: str, version: str) -> tuple[str, Measurement | None] | None:
    """A champion and its measurement, for `decide`; None for no version."""
    if not version:
        return None
    known = recorded_decision(client, name, version) or next(iter(_promotions_of(client, name, version)), None)
    return version, None if known is None or known.evidence is None else known.evidence.measurement


@dataclass(frozen=True)
class AliasChange:
    """What `ncsn promote` or `ncsn rollback` did, or would do."""

    model: str
    version: str  # the champion now
    replaced: str  # the champion before; empty if there was none
    reason: str
    changed: bool  # whether the alias moved
    dry_run: bool


def promote_version(
    client: MlflowClient, name: str, *, version: str | None = None, force: bool = False, dry_run: bool = False
) -> AliasChange:
    """Ask the gate again about a registered version, the challenger if None, and make it champion if it may.

    With `force` it becomes champion whatever the gate says. The decision leaves the same tags and the same artifact
    `gate.json` as one of the register step.
    """
    require_model(client, name)
    chosen = version or _challenger(client, name)
    require_version(client, name, chosen)
    while True:
        last = None if dry_run else apply_last(client, name)
        champion = champion_version(client, name) if last is None else last.version
        if champion == chosen:
            if last is not None and last.by == "hand" and last.decision:
                _record(client, name, chosen, Decision.from_plain(json.loads(last.decision)))
            return AliasChange(name, chosen, chosen, "it is the champion already", changed=False, dry_run=dry_run)
        decision = _decide_again(client, name, chosen, champion)
        if not decision.promoted and not force:
            raise UserError(
                f"models:/{name}/{chosen}", f"not promoted: {decision.reason}", hint="--force promotes it anyway"
            )
        if not decision.promoted:
            decision = replace(decision, promoted=True, reason=f"promoted by hand although {decision.reason}")
        if last is not None:
            if not promote(client, name, chosen, decision, after=last, by="hand"):
                continue  # another promotion came between
            _record(client, name, chosen, decision)
        return AliasChange(name, chosen, champion, decision.reason, changed=True, dry_run=dry_run)


def roll_back(client: MlflowClient, name: str, *, dry_run: bool = False) -> AliasChange:
    """Make the champion before the present one champion again."""
    require_model(client, name)
    while True:
        last = None if dry_run else apply_last(client, name)
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
            if not promote(client, name, previous, reason, after=last, by="rollback"):
                continue
            now = utc_now()
            tag_version(client, name, champion, {"rolled_back_at": now, "rolled_back_to": previous})
        return AliasChange(name, previous, champion, reason, changed=True, dry_run=dry_run)


def _decide_again(client: MlflowClient, name: str, version: str, champion: str) -> Decision:
    recorded, known = recorded_decision(client, name, version), known_champion(client, name, champion)
    if recorded is not None and recorded.evidence is not None:
        return decide(recorded.evidence, version=version, champion=known)
    reason = "it has no measurement with an uncertainty on record; evaluate and register its run again"
    return Decision(False, reason, None, *(known or ()))


def _record(client: MlflowClient, name: str, version: str, decision: Decision) -> None:
    """Write artifact and tags, unless an interrupted process has written them."""
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
