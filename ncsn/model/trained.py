"""What a registered model has of a trained network: its config, EMA weights, moments, and classes if it knows some."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ncsn import storage
from ncsn.config import from_json, to_json
from ncsn.model.checkpoint import (
    TrainedNetwork,
    load_for_sampling,
    load_moments,
    moment_tensors,
    network_from_weights,
    plain,
)
from ncsn.model.classes import Classes
from ncsn.model.index import INDEX

TRAINED_CONFIG = "config.json"
_WEIGHTS, _MOMENTS, _CLASSES = "ema.safetensors", "moments.safetensors", "classes.json"


def save_trained(trained: TrainedNetwork, folder: Path) -> None:
    """Inverse of `load_trained`, into an existing folder."""
    # Buffers are rebuilt from the config.
    save_file(plain(dict(trained.network.named_parameters())), folder / _WEIGHTS)
    save_file(moment_tensors(trained.moments), folder / _MOMENTS)
    (folder / TRAINED_CONFIG).write_text(to_json(trained.config))
    if trained.classes is not None:
        (folder / _CLASSES).write_text(json.dumps(asdict(trained.classes)))


def load_trained(folder: Path, *, origin: str, device: str | torch.device = "cpu") -> TrainedNetwork:
    """Read the files of a registered model.

    Raises:
        CheckpointError: if the weights do not fit the network of the config.
    """
    config, classes = from_json((folder / TRAINED_CONFIG).read_text()), folder / _CLASSES
    return TrainedNetwork(
        config=config,
        network=network_from_weights(config, load_file(folder / _WEIGHTS), origin=origin).to(device),
        moments=load_moments(folder / _MOMENTS),
        classes=Classes.of(json.loads(classes.read_text())) if classes.exists() else None,
    )


def load_for_generation(uri: str, *, device: str | torch.device = "cpu") -> TrainedNetwork:
    """Read the checkpoint at `uri`, or the files of `save_trained` there.

    Raises:
        CheckpointError: if it is neither.
    """
    if storage.exists(storage.join(uri, INDEX)) or not storage.exists(storage.join(uri, TRAINED_CONFIG)):
        return load_for_sampling(uri, device=device)
    with storage.local_copy(uri) as folder:
        return load_trained(folder, origin=uri, device=device)
