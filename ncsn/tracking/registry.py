"""Putting a model into MLflow's registry: one version per weights and sampler, however often it is asked."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ncsn.model.checkpoint import TRAINED_CONFIG, SamplingCheckpoint
from ncsn.tracking.connection import TrackingError, one_line, shown
from ncsn.tracking.delivery import patience
from ncsn.tracking.packaging import write_model
from ncsn.tracking.run import StepRun
from ncsn.tracking.versions import ensure_model, require_model_name

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

DESCRIPTION_LENGTH = 5000
"""What MLflow's database keeps of a description."""
DOWNLOAD_RETRIES, DOWNLOAD_SECONDS = 3, 30
"""Repeats of a request that fails, with pauses of 2, 4 and 8 seconds, and how long an answer may take."""

_FILES = "ajax-api/2.0/mlflow/logged-models/{model_id}/artifacts/files?artifact_file_path="
"""Relative, so that it holds under whatever address the page is opened."""
_HEADINGS = ("The following failures occurred", "#####")


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


def register(tracked: StepRun, candidate: Candidate) -> ModelVersion:
    """The version of this candidate: a new one, or the one that it has already.

    Raises:
        UserError: for a name that the registry does not take.
    """
    require_model_name(candidate.name)
    client = tracked.client
    ensure_model(client, candidate.name, description="Images from a noise conditional score network.")
    found = find_version(client, candidate.name, digest=candidate.digest)
    if found is not None:
        return found
    logged = _log_model(tracked, candidate)
    images_seen = candidate.checkpoint.images_seen
    identity = {"ncsn.model": candidate.digest, "ncsn.model.checkpoint": candidate.checkpoint.digest}
    created = client.create_model_version(
        candidate.name,
        # Not models:/<id>: with a local database MLflow would look that up in its global tracking server.
        logged.artifact_location,
        run_id=tracked.run_id,
        tags={**candidate.tags, **identity, "ncsn.images_seen": str(images_seen)},
        description=_description(candidate, logged.model_id),
        model_id=logged.model_id,
    )
    first = find_version(client, candidate.name, digest=candidate.digest) or created
    if int(first.version) != int(created.version):
        # Another process registered the same at the same moment; the lower number stays.
        client.delete_model_version(candidate.name, created.version)
    return first


def _description(candidate: Candidate, model_id: str) -> str:
    """The card, whose pictures MLflow's page finds only by the address of the logged model's files."""
    text = candidate.card
    for name in candidate.files:
        text = text.replace(f"]({name})", f"]({_FILES.format(model_id=model_id)}{name})")
    return text[:DESCRIPTION_LENGTH]


def find_version(client: MlflowClient, name: str, *, digest: str) -> ModelVersion | None:
    """The oldest version with this candidate digest."""
    found = client.search_model_versions(f"name = '{name}' and tags.`ncsn.model` = '{digest}'")
    return min(found, key=lambda version: int(version.version), default=None)


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


def fetch_weights(uri: str, version: ModelVersion, into: Path) -> Path:
    """Download what a version generates images with, laid out as `ncsn.model.checkpoint.save_trained` does.

    Args:
        uri: Of the registry.
        version: From that registry.
        into: An existing folder.

    Raises:
        TrackingError: if they cannot be had, with the reason.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        # The source is the artifacts' own address: a name would be looked up in MLflow's global registry.
        source = f"{str(version.source).rstrip('/')}/artifacts"
        with patience(retries=DOWNLOAD_RETRIES, timeout=DOWNLOAD_SECONDS):
            folder = Path(download_artifacts(source, dst_path=str(into), tracking_uri=uri))
        cause = "" if (folder / TRAINED_CONFIG).is_file() else f"there is no {TRAINED_CONFIG}"
    except (MlflowException, OSError) as error:
        cause = _first_failure(error)
    if cause:
        raise TrackingError(
            f"models:/{version.name}/{version.version}",
            f"{shown(uri)} gives no weights and config of ncsn at {version.source}: {cause}",
            hint="was it registered by `ncsn register`?",
        )
    return folder


def _first_failure(error: Exception) -> str:
    """The reason for the first file; MLflow puts headings before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(_HEADINGS)), one_line(error))
