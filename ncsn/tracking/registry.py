"""MLflow's model registry: versions that are registered once, and the gate to the alias `champion`."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncsn.checkpoint import SamplingCheckpoint
from ncsn.config.schema import MODEL_NAME_PATTERN
from ncsn.evaluation.measurement import FingerprintMismatchError, Measurement
from ncsn.tracking.packaging import write_model
from ncsn.tracking.run import StepRun

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION = "champion"
CHALLENGER = "challenger"
DESCRIPTION_LENGTH = 5000
"""What MLflow's database keeps of a description."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint on its way into the registry.

    Attributes:
        name: Name of the registered model.
        checkpoint: Network with EMA weights, and the config whose sampling section the model generates with.
        card: Model card, Markdown; becomes the version's description.
        files: Name -> content of what else lies beside the weights, such as the grid.
        metrics: Figures to show with the model.
        tags: Where it comes from.
    """

    name: str
    checkpoint: SamplingCheckpoint
    card: str
    files: Mapping[str, bytes]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Equal for equal weights with equal sampler settings: then it is one version."""
        config = self.checkpoint.config
        recipe = {"weights": self.checkpoint.digest, "sampler": config.sampling.sampler.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Decision:
    """What the gate said, and why.

    Attributes:
        promoted: Whether the version became champion.
        reason: One sentence with the numbers.
        measurement: The version's figure.
        champion_version: The champion it was compared with, and which it replaced if promoted; empty if none.
        champion_measurement: That one's figure; None if there was none.
    """

    promoted: bool
    reason: str
    measurement: Measurement
    champion_version: str = ""
    champion_measurement: Measurement | None = None


def register(tracked: StepRun, candidate: Candidate) -> ModelVersion:
    """The version of this candidate: a new one, or the one that it has already.

    Raises:
        ValueError: for a name that the registry does not take.
    """
    require_model_name(candidate.name)
    client = tracked.client
    _create_model(client, candidate.name)
    found = find_version(client, candidate.name, digest=candidate.digest)
    if found is not None:
        return found
    logged = _log_model(tracked, candidate)
    images_seen = candidate.checkpoint.images_seen
    identity = {"ncsn.model": candidate.digest, "ncsn.checkpoint": candidate.checkpoint.digest}
    created = client.create_model_version(
        candidate.name,
        # Not models:/<id>: with a local database MLflow would look that up in its global tracking server.
        logged.artifact_location,
        run_id=tracked.run_id,
        tags={**candidate.tags, **identity, "ncsn.images_seen": str(images_seen)},
        description=candidate.card[:DESCRIPTION_LENGTH],
        model_id=logged.model_id,
    )
    first = find_version(client, candidate.name, digest=candidate.digest) or created
    if int(first.version) != int(created.version):
        # Another process registered the same at the same moment; the lower number stays.
        client.delete_model_version(candidate.name, created.version)
    return first


def find_version(client: MlflowClient, name: str, *, digest: str) -> ModelVersion | None:
    """The oldest version with this candidate digest."""
    found = client.search_model_versions(f"name = '{name}' and tags.`ncsn.model` = '{digest}'")
    return min(found, key=lambda version: int(version.version), default=None)


def has_version(client: MlflowClient, name: str, version: str) -> bool:
    """Whether the registry still has this version."""
    return bool(client.search_model_versions(f"name = '{name}' and version_number = {int(version)}"))


def aliases_of(client: MlflowClient, name: str, version: str) -> list[str]:
    """Aliases of a version, sorted."""
    return sorted(client.get_model_version(name, version).aliases)


def pass_gate(client: MlflowClient, *, name: str, version: str, measurement: Measurement) -> Decision:
    """Make the version `challenger`, and `champion` if its figure is better than the present champion's.

    The decision, its numbers and who was replaced become tags of the version. Asked again with the same figure, it
    returns the recorded decision and changes nothing.
    """
    recorded = _recorded(client, name, version)
    if recorded is not None and recorded.measurement == measurement:
        return recorded
    set_alias(client, name=name, alias=CHALLENGER, version=version)
    while True:
        decision = decide(measurement, version=version, champion=_champion(client, name))
        if decision.promoted and not _promote(client, name, version, replaced=decision.champion_version):
            continue  # another pipeline promoted at the same moment: compare with that one
        _tag(client, name, version, _as_tags(decision))
        return decision


def decide(measurement: Measurement, *, version: str, champion: tuple[str, Measurement | None] | None) -> Decision:
    """Compare a version's figure with the champion's, given as its version and figure; None if there is none."""
    number, other = champion or ("", None)
    decision = Decision(False, "", measurement, number, other)
    shown = f"{measurement.name} = {measurement.value:.4g}"
    if not math.isfinite(measurement.value):
        return replace(decision, reason=f"{shown} is not a finite number")
    if champion is None:
        return replace(decision, promoted=True, reason=f"{shown}; there was no champion")
    if number == version:
        return Decision(True, f"{shown}; it was the champion already", measurement)
    if other is None:
        return replace(decision, reason=f"champion version {number} has no recorded figure to compare {shown} with")
    try:
        better = measurement.better_than(other)
    except FingerprintMismatchError as mismatch:
        return replace(decision, reason=f"not comparable with champion version {number}: {mismatch}")
    verdict = "is better than" if better else "is not better than"
    return replace(
        decision, promoted=better, reason=f"{shown} {verdict} {other.value:.4g} of champion version {number}"
    )


def set_alias(client: MlflowClient, *, name: str, alias: str, version: str) -> None:
    """Point an alias at a version.

    Raises:
        ValueError: for an alias that MLflow reserves or does not take.
    """
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise ValueError(
            f"alias {alias!r} is reserved by MLflow for version numbers; choose a word such as {CHAMPION!r}"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,254}", alias):
        raise ValueError(f"alias {alias!r} is not valid; use lower-case letters, digits, '-' and '_'")
    client.set_registered_model_alias(name, alias, version)


def require_model_name(name: str) -> None:
    """Refuse a name that cannot be part of a `models:/name@alias` address.

    Raises:
        ValueError: with what is allowed.
    """
    if not re.fullmatch(MODEL_NAME_PATTERN, name):
        raise ValueError(
            f"registered model name {name!r} is not valid; use letters, digits, '.', '-' and '_', no spaces, '/' or ':'"
        )


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Images from a noise conditional score network.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _log_model(tracked: StepRun, candidate: Candidate) -> LoggedModel:
    """Upload the model's folder as a logged model of the run."""
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.models import Model

    client, checkpoint = tracked.client, candidate.checkpoint
    logged = client.create_logged_model(
        tracked.experiment_id, name=candidate.name, source_run_id=tracked.run_id, tags=dict(candidate.tags)
    )
    origin = Model(
        artifact_path=logged.artifact_location,
        run_id=tracked.run_id,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
    )
    with tempfile.TemporaryDirectory(prefix="ncsn-") as temporary:
        folder = Path(temporary) / "model"
        metadata = {"images_seen": checkpoint.images_seen, "checkpoint_digest": checkpoint.digest}
        files = {**candidate.files, "model_card.md": candidate.card.encode()}
        write_model(folder, checkpoint, metadata=metadata, files=files, origin=origin)
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(tracked.run_id, [LoggedModelOutput(logged.model_id, step=checkpoint.images_seen)])
    now = int(time.time() * 1000)
    figures = [
        Metric(name, value, now, checkpoint.images_seen, model_id=logged.model_id)
        for name, value in candidate.metrics.items()
    ]
    client.log_batch(tracked.run_id, metrics=figures, synchronous=True)
    return logged


def _promote(client: MlflowClient, name: str, version: str, *, replaced: str) -> bool:
    """Make the version champion; False if another one took the alias in between."""
    present = _champion(client, name)
    if present is None or present[0] != version:
        # Written first: should this process die next, the repeated call finds the alias but not who had it.
        _tag(client, name, version, {"promoted_from": replaced, "promoted_at": _now()})
        set_alias(client, name=name, alias=CHAMPION, version=version)
        present = _champion(client, name)
    if present is not None and present[0] == version:
        return True
    for key in ("promoted_from", "promoted_at"):
        client.delete_model_version_tag(name, version, key)
    return False


def _champion(client: MlflowClient, name: str) -> tuple[str, Measurement | None] | None:
    """Version and recorded figure of the present champion."""
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return str(version.version), _measurement(version.tags)


def _recorded(client: MlflowClient, name: str, version: str) -> Decision | None:
    """The decision that a version's tags hold; the last tag to be written says that it is complete."""
    tags = client.get_model_version(name, version).tags
    if "gate.decision" not in tags:
        return None
    fields: dict[str, Any] = json.loads(tags["gate.decision"])
    for key in ("measurement", "champion_measurement"):
        fields[key] = fields[key] and Measurement(**fields[key])
    return Decision(**fields)


def _as_tags(decision: Decision) -> dict[str, str]:
    measurement = decision.measurement
    return {
        "gate.metric": measurement.name,
        "gate.value": repr(measurement.value),
        "gate.num_images": str(measurement.num_images),
        "gate.fingerprint": measurement.fingerprint,
        "gate.promoted": str(decision.promoted).lower(),
        "gate.reason": decision.reason,
        "gate.champion_version": decision.champion_version,
        "gate.decided_at": _now(),
        "gate.decision": json.dumps(asdict(decision)),
    }


def _measurement(tags: Mapping[str, str]) -> Measurement | None:
    if "gate.decision" not in tags:
        return None
    return Measurement(**json.loads(tags["gate.decision"])["measurement"])


def _tag(client: MlflowClient, name: str, version: str, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
