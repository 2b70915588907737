"""The gate to the alias `champion`: the evidence about a version, and the decision. Pure; imports no mlflow."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial

from pydantic import TypeAdapter, ValidationError

from ncsn.evaluation import DEVIATIONS
from ncsn.evaluation.copies import Copies
from ncsn.runs.metrics import with_interval


@dataclass(frozen=True)
class Measurement:
    """The Fréchet distance of a set of generated images."""

    name: str  # area/what_n<count>, for example eval/classifier_fid_n512
    value: float
    log_std: float  # standard deviation of its log over other samples of the same size
    num_images: int
    fingerprint: str  # hash of extractor, weights, resizing, reference split and dataset

    def __str__(self) -> str:
        factor = math.exp(DEVIATIONS * self.log_std)
        return with_interval(self.value, self.value / factor, self.value * factor)


@dataclass(frozen=True)
class Floors:
    """What a version must reach, whatever the champion is: `tracking.require`."""

    figure: str = ""  # name of the measurement that they are of; empty without floors
    fid_below: float | None = None
    copies_below: float | None = None  # share of the samples
    utility_above: float | None = None  # points of balanced accuracy


@dataclass(frozen=True)
class Evidence:
    """What the gate knows about a version, and asks of it."""

    measurement: Measurement
    copies: Copies
    not_finite: tuple[str, ...] = ()  # metrics and weights that hold NaN or infinity
    floors: Floors = Floors()
    utility: float | None = None  # lower end of what its images gain a classifier; None if nobody has asked

    @property
    def objection(self) -> str:
        """Why the version may not be champion, whichever it is compared with; empty if it may."""
        measured, copies, floors = self.measurement, self.copies, self.floors
        if not (math.isfinite(measured.value) and math.isfinite(measured.log_std)):
            return f"{measured.name} = {measured} is not a finite number"
        if self.not_finite:
            return f"{', '.join(self.not_finite[:3])} hold NaN or infinity"
        if copies.more_than_chance or copies.unclear:
            return str(copies)
        if floors.figure not in ("", measured.name):
            return f"tracking.require is of {floors.figure}, not {measured.name}; evaluate with the run's own settings"
        if floors.fid_below is not None and not measured.value < floors.fid_below:
            return f"{measured.name} = {measured} is not below tracking.require.fid_below = {floors.fid_below:g}"
        if floors.copies_below is not None and not copies.copies / copies.num_images < floors.copies_below:
            return f"{copies}: not below tracking.require.copies_below = {floors.copies_below:g}"
        gained = -math.inf if self.utility is None else self.utility
        if floors.utility_above is not None and not gained > floors.utility_above:
            told = "nobody has asked classifiers" if self.utility is None else f"classifiers gain {gained:.3g} or more"
            return f"{told}: not above tracking.require.utility_above = {floors.utility_above:g}"
        return ""


@dataclass(frozen=True)
class Decision:
    """The gate's decision about a version."""

    promoted: bool
    reason: str  # one sentence with the numbers
    evidence: Evidence | None  # None if the version was promoted by hand without any
    champion_version: str = ""  # the champion that it was compared with, and replaced if promoted
    number: int = 0  # of the promotion; 0 if not promoted
    waits: bool = False  # for `ncsn promote`: the gate would promote it

    @classmethod
    @lru_cache(maxsize=256)  # the same few are read again and again
    def from_json(cls, text: str) -> Decision | None:
        """Inverse of `json.dumps(asdict(...))`, None for any other text; evidence of another version counts as none."""
        with suppress(ValueError, TypeError, RecursionError):
            values, read = json.loads(text), partial(TypeAdapter(cls).validate_python, extra="forbid")
            with suppress(ValidationError):
                return read(values)
            return read(values | {"evidence": None})
        return None


def decide(evidence: Evidence, *, version: str, champion: str, of_champion: Evidence | None) -> Decision:
    """Compare a version with the champion, given as its version and evidence; an empty version for no champion."""
    measured = evidence.measurement
    shown = f"{measured.name} = {measured}"
    promote = partial(Decision, True, evidence=evidence, champion_version=champion)
    refuse = partial(Decision, False, evidence=evidence, champion_version=champion)
    if objection := evidence.objection:
        kept = "; it stays champion until `ncsn promote --rollback`" if champion == version else ""
        return refuse(objection + kept)
    if not champion:
        return promote(f"{shown}; there was no champion")
    if champion == version:
        return Decision(True, f"{shown}; it was the champion already", evidence)
    if of_champion is None:
        return refuse(
            f"champion version {champion} has no measurement with an uncertainty to compare {shown} with; evaluate and "
            "register its run again"
        )
    other = of_champion.measurement
    mismatch = ""
    if (measured.name, measured.num_images) != (other.name, other.num_images):
        mismatch = (
            f"{measured.name} over {measured.num_images} images, not {other.name} over {other.num_images}; evaluate "
            "both with one extractor and the same number of images"
        )
    elif measured.fingerprint != other.fingerprint:
        mismatch = (
            f"fingerprints {measured.fingerprint[:12]} and {other.fingerprint[:12]} differ (extractor, weights or "
            "reference images): `ncsn promote --force` decides between models of other images"
        )
    if mismatch:
        return refuse(f"not comparable with champion version {champion}: {mismatch}")
    factor = math.exp(math.hypot(measured.log_std, other.log_std))  # one deviation of the difference of the logs
    better = other.value > measured.value * factor  # NaN is never better
    verdict = (
        f"is {'' if better else 'not '}smaller by more than the combined uncertainty, a factor of {factor:.3g}, than"
    )
    sets = f"each from one set of {measured.num_images:,} images"
    return (promote if better else refuse)(f"{shown} {verdict} {other} of champion version {champion}, {sets}")
