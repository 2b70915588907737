"""The gate to the alias `champion`: what it looks at, how it decides, and what `ncsn promote` and `rollback` do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ncsn.evaluation.measurement import FingerprintMismatchError, Measurement, Memorisation
from ncsn.tracking.promotions import champion_version, history, previous_champion, promote, settle
from ncsn.tracking.versions import (
    CHALLENGER,
    CHAMPION,
    aliased_version,
    require_model,
    require_version,
    set_alias,
    tag_version,
)

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


@dataclass(frozen=True)
class Evidence:
    """What is known of a version when it comes to the gate.

    Attributes:
        measurement: Its figure.
        memorisation: Whether it copies training images.
        not_finite: Names of figures and weights that hold NaN or infinity.
    """

    measurement: Measurement
    memorisation: Memorisation
    not_finite: tuple[str, ...] = ()

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Evidence:
        """Inverse of `dataclasses.asdict`."""
        return cls(
            Measurement(**values["measurement"]),
            Memorisation(**values["memorisation"]),
            tuple(values["not_finite"]),
        )


@dataclass(frozen=True)
class Decision:
    """What the gate said, and why.

    Attributes:
        promoted: Whether the version became champion.
        reason: One sentence with the numbers.
        evidence: Of the version.
        champion_version: The champion it was compared with, and which it replaced if promoted; empty if none.
        champion_measurement: That one's figure; None if there was none.
    """

    promoted: bool
    reason: str
    evidence: Evidence
    champion_version: str = ""
    champion_measurement: Measurement | None = None

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Decision:
        """Inverse of `dataclasses.asdict`."""
        champion = values["champion_measurement"]
        evidence = Evidence.from_plain(values["evidence"])
        parsed = {"evidence": evidence, "champion_measurement": champion and Measurement(**champion)}
        return cls(**{**values, **parsed})


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


def not_finite(values: Mapping[str, float]) -> list[str]:
    """Names of the values that are NaN or infinite."""
    return [name for name, value in values.items() if not math.isfinite(value)]


def decide(evidence: Evidence, *, version: str, champion: tuple[str, Measurement | None] | None) -> Decision:
    """Compare a version with the champion, given as its version and figure; None if there is none."""
    number, other = champion or ("", None)
    measured = evidence.measurement
    decision = Decision(False, "", evidence, number, other)
    shown = f"{measured.name} = {measured}"
    if objection := _objection(evidence):
        kept = "; it stays champion until `ncsn rollback`" if number == version else ""
        return replace(decision, reason=objection + kept)
    if champion is None:
        return replace(decision, promoted=True, reason=f"{shown}; there was no champion")
    if number == version:
        return Decision(True, f"{shown}; it was the champion already", evidence)
    if other is None:
        return replace(
            decision,
            reason=f"champion version {number} has no figure with an uncertainty to compare {shown} with; "
            "evaluate and register its run again",
        )
    try:
        better = measured.better_than(other)
    except FingerprintMismatchError as mismatch:
        return replace(decision, reason=f"not comparable with champion version {number}: {mismatch}")
    combined = f"the combined uncertainty {measured.combined_uncertainty(other):.2g}"
    verdict = f"is better by more than {combined} than" if better else f"is not better by more than {combined} than"
    return replace(decision, promoted=better, reason=f"{shown} {verdict} {other} of champion version {number}")


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
        made = decide(evidence, version=version, champion=_known(client, name, last.version))
        if made.promoted and last.version != version:
            written = json.dumps(asdict(made))
            if not promote(client, name, version, after=last, by="gate", reason=made.reason, decision=written):
                continue  # another pipeline promoted at the same moment: compare with that one
        decision = made
    settle(client, name)  # what was begun may lack its alias
    tag_version(client, name, version, _as_tags(decision))
    return decision


def promote_version(
    client: MlflowClient, name: str, *, version: str | None = None, force: bool = False, dry_run: bool = False
) -> AliasChange:
    """Ask the gate again about a version that is registered, and make it champion if it may.

    Args:
        client: Of the registry.
        name: Registered model.
        version: Which one; the challenger if None.
        force: Make it champion whatever the gate says.
        dry_run: Change nothing.

    Raises:
        ValueError: for an unknown model or version, or if the gate refuses.
    """
    require_model(client, name)
    chosen = version or _challenger(client, name)
    require_version(client, name, chosen)
    recorded = recorded_decision(client, name, chosen)
    while True:
        last = None if dry_run else settle(client, name)
        champion = champion_version(client, name) if last is None else last.version
        if champion == chosen:
            return AliasChange(name, chosen, chosen, "it is the champion already", changed=False, dry_run=dry_run)
        promoted, reason = _asked_again(client, name, chosen, recorded, champion)
        if not promoted and not force:
            raise ValueError(f"{name} version {chosen} is not promoted: {reason}; --force promotes it all the same")
        reason = reason if promoted else f"promoted by hand although {reason}"
        if last is None or promote(client, name, chosen, after=last, by="hand", reason=reason):
            return AliasChange(name, chosen, champion, reason, changed=True, dry_run=dry_run)


def roll_back(client: MlflowClient, name: str, *, dry_run: bool = False) -> AliasChange:
    """Make the champion before the present one champion again.

    Raises:
        ValueError: for an unknown model, or if no earlier champion is on record.
    """
    require_model(client, name)
    while True:
        last = None if dry_run else settle(client, name)
        champion = champion_version(client, name)
        previous = previous_champion(client, name)
        if not champion or previous is None:
            what = f"version {champion} is the first champion of {name}" if champion else f"{name} has no champion"
            raise ValueError(f"{what}: there is none to go back to; `ncsn promote {name} --version N` names one")
        reason = f"rolled back from version {champion}"
        if last is not None:
            if not promote(client, name, previous, after=last, by="rollback", reason=reason):
                continue
            tag_version(client, name, champion, {"rolled_back_at": _now(), "rolled_back_to": previous})
        return AliasChange(name, previous, champion, reason, changed=True, dry_run=dry_run)


def recorded_decision(client: MlflowClient, name: str, version: str) -> Decision | None:
    """The decision that a version's tags hold; None if there is none, or one of a version 0.1.0 without uncertainty."""
    written = client.get_model_version(name, version).tags.get("gate.decision")
    values = json.loads(written) if written else {}
    return Decision.from_plain(values) if "evidence" in values else None


def _objection(evidence: Evidence) -> str:
    """Why a version may not be champion whatever the present one is; empty if it may."""
    if not evidence.measurement.is_finite:
        return f"{evidence.measurement.name} = {evidence.measurement} is not a finite number"
    if evidence.not_finite:
        return f"{', '.join(evidence.not_finite[:3])} hold NaN or infinity"
    if not evidence.memorisation.passed:
        return f"{evidence.memorisation}: more than chance explains (up to {evidence.memorisation.limit:.1%})"
    return ""


def _promotions_of(client: MlflowClient, name: str, version: str) -> list[Decision]:
    """The decisions by which the gate promoted a version, as the ledger has them, latest first.

    It has them before the version's tags: its process may have been stopped in between.
    """
    entries = reversed(history(client, name))
    written = (entry.decision for entry in entries if entry.version == version and entry.decision)
    return [Decision.from_plain(json.loads(text)) for text in written]


def _asked_again(
    client: MlflowClient, name: str, version: str, recorded: Decision | None, champion: str
) -> tuple[bool, str]:
    if recorded is None:
        return False, "it has no figure with an uncertainty on record; evaluate and register its run again"
    decision = decide(recorded.evidence, version=version, champion=_known(client, name, champion))
    return decision.promoted, decision.reason


def _known(client: MlflowClient, name: str, version: str) -> tuple[str, Measurement | None] | None:
    """A champion and its figure, for `decide`."""
    if not version:
        return None
    known = recorded_decision(client, name, version) or next(iter(_promotions_of(client, name, version)), None)
    return version, None if known is None else known.evidence.measurement


def _challenger(client: MlflowClient, name: str) -> str:
    found = aliased_version(client, name, CHALLENGER)
    if found is None:
        raise ValueError(f"{name} has no {CHALLENGER}; name the version: `ncsn promote {name} --version N`")
    return str(found.version)


def _as_tags(decision: Decision) -> dict[str, str]:
    measured, other = decision.evidence.measurement, decision.champion_measurement
    tags = {
        "gate.metric": measured.name,
        "gate.value": repr(measured.value),
        "gate.uncertainty": repr(measured.uncertainty),
        "gate.num_images": str(measured.num_images),
        "gate.fingerprint": measured.fingerprint,
        "gate.memorisation": str(decision.evidence.memorisation),
        "gate.promoted": str(decision.promoted).lower(),
        "gate.reason": decision.reason,
        f"gate.{CHAMPION}_version": decision.champion_version,
        "gate.decided_at": _now(),
    }
    if other is not None:
        tags[f"gate.{CHAMPION}_value"] = repr(other.value)
        tags["gate.combined_uncertainty"] = repr(measured.combined_uncertainty(other))
    # Last: it says that the others are complete.
    return tags | {"gate.decision": json.dumps(asdict(decision))}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
