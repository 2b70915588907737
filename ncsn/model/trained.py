"""What a registered model has of a trained network: its config, EMA weights and moments.

If it knows classes, these too, and the weights and config of the network that guides it, if there is one.
"""

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
_GUIDE_WEIGHTS, _GUIDE_CONFIG = "guide.safetensors", "guide_config.json"


def save_trained(trained: TrainedNetwork, folder: Path) -> None:
    """Inverse of `load_trained`, into an existing folder."""
    # Buffers are rebuilt from the config.
    save_file(plain(dict(trained.network.named_parameters())), folder / _WEIGHTS)
    save_file(moment_tensors(trained.moments), folder / _MOMENTS)
    (folder / TRAINED_CONFIG).write_text(to_json(trained.config))
    if trained.classes is not None:
        (folder / _CLASSES).write_text(json.dumps(asdict(trained.classes)))
    if trained.guide is not None:
        save_file(plain(dict(trained.guide.network.named_parameters())), folder / _GUIDE_WEIGHTS)
        (folder / _GUIDE_CONFIG).write_text(to_json(trained.guide.config))


def load_trained(folder: Path, *, origin: str, device: str | torch.device = "cpu") -> TrainedNetwork:
    """Read the files of a registered model."""
    file = folder / _CLASSES
    classes = Classes.of(json.loads(file.read_text())) if file.exists() else None
    moments = load_moments(folder / _MOMENTS)

    def network(config: str, weights: str, guide: TrainedNetwork | None) -> TrainedNetwork:
        settings = from_json((folder / config).read_text())
        built = network_from_weights(settings, load_file(folder / weights), origin=f"{origin}, {weights}").to(device)
        return TrainedNetwork(config=settings, network=built, moments=moments, classes=classes, guide=guide)

    guide = network(_GUIDE_CONFIG, _GUIDE_WEIGHTS, None) if (folder / _GUIDE_CONFIG).exists() else None
    return network(TRAINED_CONFIG, _WEIGHTS, guide)


def load_for_generation(uri: str, *, device: str | torch.device = "cpu") -> TrainedNetwork:
    """Read the checkpoint at `uri`, or the files of `save_trained` there."""
    if storage.exists(storage.join(uri, INDEX)) or not storage.exists(storage.join(uri, TRAINED_CONFIG)):
        return load_for_sampling(uri, device=device)
    with storage.local_copy(uri) as folder:
        return load_trained(folder, origin=uri, device=device)
