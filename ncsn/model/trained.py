"""A trained network to generate with or to start a training from, and the files that a registered model has of it.

These are its config, EMA weights and moments, its classes if it knows any, and the weights and config of the network
that guides it, if there is one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ncsn import storage
from ncsn.config import Config, from_yaml, to_json
from ncsn.config.training import ema_setting
from ncsn.core.networks.transfer import transfer
from ncsn.core.training import TrainState
from ncsn.errors import InvalidValue, UserError, shown_value
from ncsn.model import build
from ncsn.model.checkpoint import (
    TrainedNetwork,
    load_checkpoint,
    moment_tensors,
    moments_of,
    network_from_weights,
    plain_weights,
)
from ncsn.model.classes import Classes
from ncsn.model.objective import require_teacher
from ncsn.runs.folder import INDEX

MUCH_OF_THE_SOURCE = 0.05  # in the average after a training that starts from it
TRAINED_CONFIG = "config.json"
_WEIGHTS, _MOMENTS, _CLASSES = "ema.safetensors", "moments.safetensors", "classes.json"
_GUIDE_WEIGHTS, _GUIDE_CONFIG = "guide.safetensors", "guide_config.json"


def save_model(trained: TrainedNetwork, folder: Path) -> None:
    """Inverse of `load_model`, into an existing folder."""
    # Buffers are rebuilt from the config.
    save_file(plain_weights(trained.network), folder / _WEIGHTS)
    save_file(moment_tensors(trained.moments), folder / _MOMENTS)
    (folder / TRAINED_CONFIG).write_text(to_json(trained.config))
    if trained.classes is not None:
        (folder / _CLASSES).write_text(json.dumps(asdict(trained.classes)))
    if trained.guide is not None:
        save_file(plain_weights(trained.guide.network), folder / _GUIDE_WEIGHTS)
        (folder / _GUIDE_CONFIG).write_text(to_json(trained.guide.config))


def load_model(folder: Path, *, origin: str, device: str | torch.device = "cpu") -> TrainedNetwork:
    """Read the files of a registered model."""
    file = folder / _CLASSES
    classes = Classes.of(json.loads(file.read_text())) if file.exists() else None
    moments = moments_of(load_file(folder / _MOMENTS))

    def network(config: str, weights: str, guide: TrainedNetwork | None) -> TrainedNetwork:
        settings = from_yaml((folder / config).read_text())
        built = network_from_weights(settings, load_file(folder / weights), origin=f"{origin}, {weights}").to(device)
        return TrainedNetwork(config=settings, network=built, moments=moments, classes=classes, guide=guide)

    guide = network(_GUIDE_CONFIG, _GUIDE_WEIGHTS, None) if (folder / _GUIDE_CONFIG).exists() else None
    return network(TRAINED_CONFIG, _WEIGHTS, guide)


def load_checkpoint_or_model(uri: str, *, device: str | torch.device = "cpu") -> TrainedNetwork:
    """Read the checkpoint at `uri`, or the files of `save_model` there."""
    if storage.exists(storage.join(uri, INDEX)) or not storage.exists(storage.join(uri, TRAINED_CONFIG)):
        return load_checkpoint(uri, device=device)
    with storage.local_copy(uri) as folder:
        return load_model(folder, origin=uri, device=device)


def start_from(uri: str, *, state: TrainState, config: Config, classes: Classes | None) -> None:
    """Give a new training the weights of the trained network at `uri`, in the network and its EMA."""
    weights, _ = adapted(load_checkpoint_or_model(uri), state.network, config=config, classes=classes)
    state.network.load_state_dict(weights, strict=False)  # buffers are those of the config
    state.ema, state.second_ema = build.new_emas(config, state.network)


def teacher(uri: str, *, config: Config, classes: Classes | None, device: torch.device) -> nn.Module:
    """The network with which a training starts from `uri`, see `build.frozen`."""
    network = build.network(config)
    weights, _ = adapted(load_checkpoint_or_model(uri), network, config=config, classes=classes)
    network.load_state_dict(weights, strict=False)
    network.to(memory_format=build.memory_format(config))
    return build.frozen(network.to(device), config)


def adapted(
    source: TrainedNetwork, network: nn.Module, *, config: Config, classes: Classes | None
) -> tuple[dict[str, Tensor], list[str]]:
    """The source's weights for the network of the config, which learns `classes`, and what changes, see `transfer`.

    Raises:
        UserError: They do not fit.
    """
    kept = None
    if source.classes is not None and classes is not None:
        labels = {name: label for label, name in enumerate(source.classes.names)}
        kept = [labels.get(name) for name in classes.names]
    if config.loss.has_teacher:
        require_teacher(source.config, config, kept=kept)
    try:
        return transfer(dict(source.network.named_parameters()), network, classes=kept)
    except InvalidValue as error:
        raise UserError(
            "train.init_from",
            f"does not fit this network: {error}",
            hint=f"use the section network of its config: {shown_value(source.config.network.model_dump())}",
            value=config.train.init_from,
        ) from None


def start_notes(source: TrainedNetwork, config: Config, changes: Sequence[str]) -> list[str]:
    """What differs between the trained network and the training that starts from it, for people."""
    notes = [f"train.init_from: {change}" for change in changes]
    old, new = (getattr(each.network, "sigma_data", None) for each in (source.config, config))
    if old != new:
        notes.append(
            f"train.init_from: network.sigma_data was {old:g} and is {new:g}, so the network sees its images at "
            "another scale; keep the old value unless you know better"
        )
    train = config.train
    left = train.averaging.untrained_share(train.num_images, batch_size=train.batch_size)
    if left > MUCH_OF_THE_SOURCE:
        notes.append(
            f"train.init_from: at the end, the EMA, which generates the images, is still {left:.0%} the "
            f"source's weights; decrease {ema_setting(train)}, or train longer"
        )
    return notes
