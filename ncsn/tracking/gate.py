"""The gate to the alias `champion`: the evidence about a version, and the decision. Pure; imports no mlflow."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ncsn.errors import UserError
from ncsn.process import utc_now
from ncsn.tracking.versions import CHAMPION

COPY_ERRORS = 3  # standard errors by which the share of copies may exceed that of real images

Author = Literal["gate", "hand", "alias", "rollback", ""]


class FingerprintMismatchError(UserError):
    """Two measurements cannot be compared."""


@dataclass(frozen=True)
class Measurement:
    """One metric of a set of generated images."""

    name: str  # area/what_n<count>, for example eval/classifier_fid_n512
    value: float
    uncertainty: float  # standard deviation over other samples of the same size
    num_images: int
    fingerprint: str  # hash of extractor, weights, resizing, reference split and dataset
    lower_is_better: bool

    def __str__(self) -> str:
        return f"{self.value:.4g} \u00b1 {self.uncertainty:.2g}"

    @property
    def is_finite(self) -> bool:
        """Whether value and uncertainty are finite."""
        return math.isfinite(self.value) and math.isfinite(self.uncertainty)

    def combined_uncertainty(self, other: Measurement) -> float:
        """Standard deviation of the difference of two independent measurements."""
        return math.hypot(self.uncertainty, other.uncertainty)

    def better_than(self, other: Measurement) -> bool:
        """Whether this one is better by more than the combined uncertainty; NaN is never better.

        Raises:
            FingerprintMismatchError: The two were not measured in the same way.
        """
        if (self.name, self.num_images) != (other.name, other.num_images):
            raise FingerprintMismatchError(
                self.name,
                f"over {self.num_images} images cannot be compared with {other.name} over {other.num_images}",
                hint="evaluate both with one extractor and the same number of images",
            )
        if self.fingerprint != other.fingerprint:
            raise FingerprintMismatchError(
                self.name,
                f"fingerprints {self.fingerprint[:12]} and {other.fingerprint[:12]} differ (extractor, weights or "
                "reference images)",
                hint="evaluate both again with one extractor and dataset",
            )
        gain = other.value - self.value if self.lower_is_better else self.value - other.value
        return gain > self.combined_uncertainty(other)


@dataclass(frozen=True)
class Memorization:
    """How many samples copy a training image, compared with real test images."""

    copies: int  # of num_images samples
    num_images: int
    real_copies: int  # of num_real_images real test images: the data has some images more than once
    num_real_images: int

    @property
    def limit(self) -> float:
        """Largest share of copies that chance explains: that of real images plus three standard errors."""
        # Of the difference of two equal shares, estimated from both sets together.
        pooled = (self.copies + self.real_copies) / (self.num_images + self.num_real_images)
        error = math.sqrt(pooled * (1 - pooled) * (1 / self.num_images + 1 / self.num_real_images))
        return self.real_copies / self.num_real_images + COPY_ERRORS * error

    @property
    def passed(self) -> bool:
        """Whether the samples copy no more than chance explains."""
        return self.copies / self.num_images <= self.limit

    @property
    def objection(self) -> str:
        """The numbers, if the samples copy more than chance explains; else empty."""
        return "" if self.passed else f"{self}: more than chance explains (up to {self.limit:.1%})"

    def __str__(self) -> str:
        return (
            f"{self.copies} of {self.num_images} samples copy a training image, "
            f"{self.real_copies} of {self.num_real_images} real ones do"
        )


@dataclass(frozen=True)
class Evidence:
    """What the gate knows about a version."""

    measurement: Measurement
    memorisation: Memorization
    not_finite: tuple[str, ...] = ()  # metrics and weights that hold NaN or infinity

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Evidence:
        """Inverse of `dataclasses.asdict`."""
        measurement, memorisation = Measurement(**values["measurement"]), Memorization(**values["memorisation"])
        return cls(measurement, memorisation, tuple(values["not_finite"]))

    def objection(self) -> str:
        """Why the version may not be champion, whatever the present one is; empty if it may."""
        if not self.measurement.is_finite:
            return f"{self.measurement.name} = {self.measurement} is not a finite number"
        if self.not_finite:
            return f"{', '.join(self.not_finite[:3])} hold NaN or infinity"
        return self.memorisation.objection


@dataclass(frozen=True)
class Decision:
    """The gate's decision about a version."""

    promoted: bool
    reason: str  # one sentence with the numbers
    evidence: Evidence | None  # None if the version was promoted by hand without any
    champion_version: str = ""  # the champion that it was compared with, and replaced if promoted
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
    """Compare a version with the champion, given as its version and measurement; None if there is none."""
    number, other = champion or ("", None)
    measured = evidence.measurement
    decision = Decision(False, "", evidence, number, other)
    shown = f"{measured.name} = {measured}"
    if objection := evidence.objection():
        kept = "; it stays champion until `ncsn rollback`" if number == version else ""
        return replace(decision, reason=objection + kept)
    if champion is None:
        return replace(decision, promoted=True, reason=f"{shown}; there was no champion")
    if number == version:
        return Decision(True, f"{shown}; it was the champion already", evidence)
    if other is None:
        return replace(
            decision,
            reason=f"champion version {number} has no measurement with an uncertainty to compare {shown} with; "
            "evaluate and register its run again",
        )
    try:
        better = measured.better_than(other)
    except FingerprintMismatchError as mismatch:
        return replace(decision, reason=f"not comparable with champion version {number}: {mismatch}")
    combined = f"the combined uncertainty {measured.combined_uncertainty(other):.2g}"
    verdict = f"is {'' if better else 'not '}better by more than {combined} than"
    return replace(decision, promoted=better, reason=f"{shown} {verdict} {other} of champion version {number}")


def decision_record(decision: Decision, *, name: str, version: str, by: Author) -> dict[str, Any]:
    """Content of the artifact `gate.json` of the run that registered a version."""
    return {"model": name, "version": version, "by": by, **asdict(decision)}


def decision_tags(decision: Decision) -> dict[str, str]:
    """Tags of the version that a decision is about."""
    tags = {
        "gate.promoted": str(decision.promoted).lower(),
        "gate.reason": decision.reason,
        f"gate.{CHAMPION}_version": decision.champion_version,
        "gate.decided_at": utc_now(),
    }
    if decision.evidence is not None:
        measured, champion = decision.evidence.measurement, decision.champion_measurement
        tags |= {
            "gate.metric": measured.name,
            "gate.value": repr(measured.value),
            "gate.uncertainty": repr(measured.uncertainty),
            "gate.num_images": str(measured.num_images),
            "gate.fingerprint": measured.fingerprint,
            "gate.memorisation": str(decision.evidence.memorisation),
        }
        if champion is not None:
            tags[f"gate.{CHAMPION}_value"] = repr(champion.value)
            tags["gate.combined_uncertainty"] = repr(measured.combined_uncertainty(champion))
    # Last: it says that the others are complete.
    return tags | {"gate.decision": json.dumps(asdict(decision))}
