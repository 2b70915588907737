"""The start of a training from a trained network, `train.init_from`."""

from __future__ import annotations

from torch import nn

from ncsn.config import Config
from ncsn.config.training import ema_setting
from ncsn.core.networks.transfer import Transferred, transfer
from ncsn.core.training import TrainState
from ncsn.errors import InvalidValue, UserError, shown_value
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import Classes
from ncsn.model.trained import load_for_generation

MUCH_OF_THE_SOURCE = 0.05  # in the average after training


def start_from(uri: str, *, state: TrainState, config: Config, classes: Classes | None) -> None:
    """Give a new training the weights of the trained network at `uri`, in the network and its running average."""
    found = adapted(load_for_generation(uri), state.network, config=config, classes=classes)
    state.network.load_state_dict(found.weights, strict=False)  # buffers are those of the config
    state.ema, state.second_ema = build.running_averages(config, state.network)


def adapted(source: TrainedNetwork, network: nn.Module, *, config: Config, classes: Classes | None) -> Transferred:
    """The source's weights for the network of the config, which learns `classes`.

    Raises:
        UserError: They do not fit.
    """
    kept = None
    if source.classes is not None and classes is not None:
        labels = {name: label for label, name in enumerate(source.classes.names)}
        kept = [labels.get(name) for name in classes.names]
    try:
        return transfer(dict(source.network.named_parameters()), network, classes=kept)
    except InvalidValue as error:
        raise UserError(
            "train.init_from",
            f"does not fit this network: {error}",
            hint=f"use the section network of its config: {shown_value(source.config.network.model_dump())}",
            value=config.train.init_from,
        ) from None


def start_notes(source: TrainedNetwork, config: Config, changes: tuple[str, ...]) -> list[str]:
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
            f"train.init_from: at the end, the moving average, which generates the images, is still {left:.0%} the "
            f"source's weights; decrease {ema_setting(train)}, or train longer"
        )
    return notes
