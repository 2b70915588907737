"""What `ncsn promote` and `ncsn rollback` do: another champion, by the hand of somebody who says so."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ncsn.errors import UserError
from ncsn.tracking.gate import (
    Decision,
    Evidence,
    decide,
    decision_record,
    decision_tags,
    known_champion,
    recorded_decision,
)
from ncsn.tracking.promotions import Promotion, champion_version, previous_champion, promote, settle
from ncsn.tracking.versions import (
    CHALLENGER,
    CHAMPION,
    aliased_version,
    require_model,
    require_version,
    tag_version,
)

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


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
