"""A checkpoint in MLflow's registry: packaged, and registered once per weights and sampler."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncsn import storage
from ncsn.clock import now_ms
from ncsn.events import tell
from ncsn.model.checkpoint import TrainedNetwork, save_network
from ncsn.model.generate import sampling_facts
from ncsn.tracking.client import suppress_exists
from ncsn.tracking.mlflow_runs import StepRun

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


MODEL_FILE = Path(__file__).with_name("model.py")
# The requirements of this project that generating images needs: no Ray, no KFP.
NEEDED = ("mlflow", "numpy", "pyarrow", "pydantic", "pyyaml", "safetensors", "torch")


def write_model(folder: Path, checkpoint: TrainedNetwork, *, files: Mapping[str, bytes], origin: Any = None) -> None:
    """Write a complete MLflow model to `folder`, which does not exist yet, with these files (name -> content).

    `origin` is MLflow's `Model` with the ids of the run and the logged model.
    """
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import infer_signature

    config = checkpoint.config
    images = np.zeros((1, *config.data.stored_shape), config.data.dtype)
    weight = config.sampling.guidance.weight if config.sampling.guidance else 1.0
    params = {"n_images": 16, "seed": config.sampling.seed, "sampler": "", "label": "", "guidance": weight}
    inputs = folder.with_name(f"{folder.name}-inputs")
    inputs.mkdir()
    save_network(checkpoint, inputs)
    # With the version ranges of this project.
    own = [line for line in importlib.metadata.requires("ncsn") or [] if "extra ==" not in line]
    requirements = {re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower(): line for line in own}
    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(MODEL_FILE),
        artifacts={path.stem: str(path) for path in sorted(inputs.iterdir())},
        code_paths=[str(Path(__file__).parents[1])],
        signature=infer_signature(model_output=images, params=params),
        input_example=(np.empty(0), {"n_images": 2}),
        pip_requirements=[requirements[name] for name in NEEDED],
        mlflow_model=origin,
    )
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)


DESCRIPTION_LENGTH = 5000  # longest description that MLflow's database keeps
# Relative, so that it works at any address of the page.
_FILES = "ajax-api/2.0/mlflow/logged-models/{model_id}/artifacts/files?artifact_file_path="
DECIDING = ("sampler", "label", "guidance")


@dataclass(frozen=True)
class Registration:
    """A checkpoint to register."""

    name: str  # of the registered model
    checkpoint: TrainedNetwork  # its config has the sampler that becomes the default
    card: str  # Markdown, which becomes the version's description
    files: Mapping[str, bytes]  # name -> content of files next to the weights, such as the grid
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Identity of weights, sampler and guidance: equal digests are one version."""
        return storage.digest({"weights": self.checkpoint.digest, **deciding(self.checkpoint)}, 16)


def deciding(trained: TrainedNetwork) -> dict[str, Any]:
    """The settings of sampling that are part of a version's identity, as plain values; see `DECIDING`."""
    facts = sampling_facts(trained.config.sampling, trained.guide)
    return {name: facts[name] for name in DECIDING if name in facts}


def register(tracked: StepRun, candidate: Registration) -> ModelVersion:
    """The version of this candidate; a new one if there is none, with its folder as a logged model of the run."""
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.models import Model

    client, checkpoint, card = tracked.client, candidate.checkpoint, candidate.card
    with suppress_exists():
        client.create_registered_model(candidate.name, description="Generates images; each version has a card.")
    found = client.search_model_versions(f"name = '{candidate.name}' and tags.`ncsn.model` = '{candidate.digest}'")
    if found:
        return min(found, key=lambda version: int(version.version))
    logged = client.create_logged_model(
        tracked.experiment_id, name=candidate.name, source_run_id=tracked.run_id, tags=dict(candidate.tags)
    )
    model_id = logged.model_id
    origin = Model(logged.artifact_location, tracked.run_id, model_uuid=model_id, model_id=model_id)
    with tempfile.TemporaryDirectory(prefix="ncsn-") as temporary:
        folder = Path(temporary) / "model"
        write_model(folder, checkpoint, files={**candidate.files, "model_card.md": card.encode()}, origin=origin)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        client.log_model_artifacts(model_id, str(folder))
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(tracked.run_id, [LoggedModelOutput(model_id, step=checkpoint.images_seen)])
    now, metrics = now_ms(), candidate.metrics.items()
    values = [Metric(key, value, now, checkpoint.images_seen, model_id=model_id) for key, value in metrics]
    client.log_batch(tracked.run_id, metrics=values)
    for name in candidate.files:  # pictures by the address of the logged model's files, which MLflow's page needs
        card = card.replace(f"]({name})", f"]({_FILES.format(model_id=model_id)}{name})")
    version = client.create_model_version(
        candidate.name,
        # Not models:/<id>: with a local database MLflow would look that up in its global tracking server.
        logged.artifact_location,
        run_id=tracked.run_id,
        tags={
            **candidate.tags,
            "ncsn.model": candidate.digest,
            "ncsn.checkpoint": checkpoint.digest,
            "ncsn.bytes": str(size),
        },
        description=card[:DESCRIPTION_LENGTH],
        model_id=model_id,
    )
    tell("registered", model=candidate.name, version=str(version.version), run=candidate.tags.get("ncsn.run", ""))
    return version
