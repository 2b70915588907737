"""The gate to the alias `champion`: what it looks at, and how it decides. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from ncsn.errors import UserError
from ncsn.tracking.versions import (
    CHAMPION,
)

COPY_ERRORS = 3
"""Standard errors by which the share of copies may lie above that of real images."""


class FingerprintMismatchError(UserError):
    """Two figures that were measured in different ways."""


@dataclass(frozen=True)
class Measurement:
    """One figure of merit.

    Attributes:
        name: `area/what_n<count>`, for example eval/classifier_fid_n512.
        value: the figure.
        uncertainty: its standard deviation over other samples of as many images.
        num_images: generated images behind it.
        fingerprint: hash of extractor, weights, resize, and reference split and data set.
        lower_is_better: the direction of improvement.
    """

    name: str
    value: float
    uncertainty: float
    num_images: int
    fingerprint: str
    lower_is_better: bool

    def __str__(self) -> str:
        """The figure and its uncertainty."""
        return f"{self.value:.4g} \u00b1 {self.uncertainty:.2g}"

    @property
    def is_finite(self) -> bool:
        """Whether both numbers are."""
        return math.isfinite(self.value) and math.isfinite(self.uncertainty)

    def combined_uncertainty(self, other: Measurement) -> float:
        """Standard deviation of the difference of the two: they come from samples that know nothing of each other."""
        return math.hypot(self.uncertainty, other.uncertainty)

    def better_than(self, other: Measurement) -> bool:
        """Whether this figure is better by more than the combined uncertainty; NaN is never better.

        Raises:
            FingerprintMismatchError: if the two were not measured in the same way.
        """
        if (self.name, self.num_images) != (other.name, other.num_images):
            raise FingerprintMismatchError(
                self.name,
                f"over {self.num_images} images cannot be compared with {other.name} over {other.num_images}",
                hint="evaluate both with one extractor and as many images",
            )
        if self.fingerprint != other.fingerprint:
            raise FingerprintMismatchError(
                self.name,
                f"fingerprints {self.fingerprint[:12]} and {other.fingerprint[:12]} differ (extractor, weights or "
                "reference images)",
                hint="evaluate both again with one extractor and data set",
            )
        gain = other.value - self.value if self.lower_is_better else self.value - other.value
        return gain > self.combined_uncertainty(other)


@dataclass(frozen=True)
class Memorisation:
    """How many of the samples copy a training image, beside how many of real test images look like copies.

    Attributes:
        copies: samples among `num_images` that do.
        num_images: samples that were looked at.
        real_copies: real test images among `num_real_images` that do; those stand in the data more than once.
        num_real_images: real test images that were looked at.
    """

    copies: int
    num_images: int
    real_copies: int
    num_real_images: int

    @property
    def limit(self) -> float:
        """Largest share of copies that chance explains: that of real images and three standard errors.

        The standard error of the difference is that of two equal shares, estimated from both sets together.
        """
        pooled = (self.copies + self.real_copies) / (self.num_images + self.num_real_images)
        error = math.sqrt(pooled * (1 - pooled) * (1 / self.num_images + 1 / self.num_real_images))
        return self.real_copies / self.num_real_images + COPY_ERRORS * error

    @property
    def passed(self) -> bool:
        """Whether the samples copy no more than chance explains."""
        return self.copies / self.num_images <= self.limit

    def __str__(self) -> str:
        """The two counts."""
        return (
            f"{self.copies} of {self.num_images} samples copy a training image, "
            f"{self.real_copies} of {self.num_real_images} real ones do"
        )


Author = Literal["gate", "hand", "alias", "rollback", ""]


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


def decision_record(decision: Decision, *, name: str, version: str, by: Author) -> dict[str, Any]:
    """What the artifact `gate.json` of the run that registered a version says."""
    return {"model": name, "version": version, "by": by, **asdict(decision)}


def _objection(evidence: Evidence) -> str:
    """Why a version may not be champion whatever the present one is; empty if it may."""
    if not evidence.measurement.is_finite:
        return f"{evidence.measurement.name} = {evidence.measurement} is not a finite number"
    if evidence.not_finite:
        return f"{', '.join(evidence.not_finite[:3])} hold NaN or infinity"
    if not evidence.memorisation.passed:
        return f"{evidence.memorisation}: more than chance explains (up to {evidence.memorisation.limit:.1%})"
    return ""


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
