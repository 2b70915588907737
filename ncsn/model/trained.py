"""A trained network that a training starts from, or learns from."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ncsn.config import Config
from ncsn.config.training import ema_setting
from ncsn.core.networks.transfer import transfer
from ncsn.core.training import TrainState
from ncsn.errors import InvalidValue, UserError
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork, load_checkpoint
from ncsn.model.classes import Classes
from ncsn.model.objective import require_teacher

MUCH_OF_THE_SOURCE = 0.05  # in the average after a training that starts from it


def start_from(uri: str, *, state: TrainState, config: Config, classes: Classes | None) -> None:
    """Give a new training the weights of the trained network at `uri`, in the network and its EMA."""
    weights, _ = adapted(load_checkpoint(uri), state.network, config=config, classes=classes)
    state.network.load_state_dict(weights, strict=False)  # buffers are those of the config
    state.ema = build.new_ema(config, state.network)


def teacher(uri: str, *, config: Config, classes: Classes | None, device: torch.device) -> nn.Module:
    """The network with which a training starts from `uri`, see `build.frozen`."""
    network = build.network(config)
    weights, _ = adapted(load_checkpoint(uri), network, config=config, classes=classes)
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
        reason, key = f"does not fit this network: {error}", "train.init_from"
        hint = f"use the section network of its config: {json.dumps(source.config.network.model_dump(mode='json'))}"
        raise UserError(key, reason, hint=hint, value=config.train.init_from) from None


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
