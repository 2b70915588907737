"""The gate to the alias `champion`: what it looks at, how it decides, and what it leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ncsn.evaluation.measurement import FingerprintMismatchError, Measurement, Memorisation
from ncsn.tracking.promotions import Author, history, promote, settle
from ncsn.tracking.versions import CHALLENGER, CHAMPION, set_alias, tag_version

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
        evidence: Of the version; None if it was promoted by hand without any.
        champion_version: The champion it was compared with, and which it replaced if promoted; empty if none.
        champion_measurement: That one's figure; None if there was none.
    """

    promoted: bool
    reason: str
    evidence: Evidence | None
    champion_version: str = ""
    champion_measurement: Measurement | None = None

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Decision:
        """Inverse of `dataclasses.asdict`."""
        champion, evidence = values["champion_measurement"], values["evidence"]
        parsed = {
            "evidence": evidence and Evidence.from_plain(evidence),
            "champion_measurement": champion and Measurement(**champion),
        }
        return cls(**{**values, **parsed})


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
        made = decide(evidence, version=version, champion=known_champion(client, name, last.version))
        if made.promoted and last.version != version:
            written = json.dumps(asdict(made))
            if not promote(client, name, version, after=last, by="gate", reason=made.reason, decision=written):
                continue  # another pipeline promoted at the same moment: compare with that one
        decision = made
    settle(client, name)  # what was begun may lack its alias
    tag_version(client, name, version, decision_tags(decision))
    return decision


def decision_record(decision: Decision, *, name: str, version: str, by: Author) -> dict[str, Any]:
    """What the artifact `gate.json` of the run that registered a version says."""
    return {"model": name, "version": version, "by": by, **asdict(decision)}


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


def known_champion(client: MlflowClient, name: str, version: str) -> tuple[str, Measurement | None] | None:
    """A champion and its figure, for `decide`; None for no version."""
    if not version:
        return None
    known = recorded_decision(client, name, version) or next(iter(_promotions_of(client, name, version)), None)
    return version, None if known is None or known.evidence is None else known.evidence.measurement


def decision_tags(decision: Decision) -> dict[str, str]:
    """The tags of the version that a decision is about."""
    tags = {
        "gate.promoted": str(decision.promoted).lower(),
        "gate.reason": decision.reason,
        f"gate.{CHAMPION}_version": decision.champion_version,
        "gate.decided_at": _now(),
    }
    if decision.evidence is not None:
        tags |= _figure_tags(decision.evidence, decision.champion_measurement)
    # Last: it says that the others are complete.
    return tags | {"gate.decision": json.dumps(asdict(decision))}


def _figure_tags(evidence: Evidence, champion: Measurement | None) -> dict[str, str]:
    measured = evidence.measurement
    tags = {
        "gate.metric": measured.name,
        "gate.value": repr(measured.value),
        "gate.uncertainty": repr(measured.uncertainty),
        "gate.num_images": str(measured.num_images),
        "gate.fingerprint": measured.fingerprint,
        "gate.memorisation": str(evidence.memorisation),
    }
    if champion is not None:
        tags[f"gate.{CHAMPION}_value"] = repr(champion.value)
        tags["gate.combined_uncertainty"] = repr(measured.combined_uncertainty(champion))
    return tags


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
