"""Reads the checkpoints that the authors of NCSN and NCSNv2 released, without running any code inside them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncsn.core.ema import Ema
from ncsn.core.networks.transfer import misfits
from ncsn.errors import InvalidValue

_PREFIX = "module."


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """The content of a released `checkpoint.pth`."""

    weights: dict[str, Tensor]  # by name, without the `module.` prefix
    optimizer: dict[str, Any]  # state dict of Adam, its states numbered by parameter
    num_steps: int  # from Adam's count; NCSN's file has no other
    ema: dict[str, Tensor] | None  # averaged parameters by name; NCSN's file has none


def read_released_checkpoint(path: str | Path) -> ReleasedCheckpoint:
    """Read a file: the list [weights, optimizer] of NCSN or [weights, optimizer, epoch, step, (EMA)] of NCSNv2."""
    with Path(path).open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        # A truncated archive is an OSError to PyTorch's reader.
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            reason = [*str(error).strip().splitlines(), type(error).__name__][0]
            raise InvalidValue(f"{path} is not a checkpoint that can be read safely: {reason}") from error
    if not isinstance(content, list) or len(content) not in (2, 4, 5):
        kind = f"a list of {len(content)}" if isinstance(content, list) else type(content).__name__
        raise InvalidValue(
            f"{path} holds {kind}; expected the list [weights, optimizer] of NCSN, "
            "or [weights, optimizer, epoch, step] with or without EMA of NCSNv2"
        )
    weights = _tensors(content[0], path=path, part="weights")
    optimizer = _optimizer(content[1], path=path)
    counts = {int(state["step"]) for state in optimizer["state"].values()}
    return ReleasedCheckpoint(
        weights=weights,
        optimizer=optimizer,
        num_steps=max(counts, default=0),
        ema=_tensors(content[4], path=path, part="EMA") if len(content) == 5 else None,
    )


def load_released_checkpoint(
    released: ReleasedCheckpoint, *, network: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema
) -> None:
    """Set the weights, Adam's moments and the EMA to those of a released checkpoint.

    Without an average in the file, the EMA starts as a copy of the weights. The optimizer keeps its
    learning rate and other settings. Everything is checked before anything is changed.

    Raises:
        InvalidValue: Names, shapes or the optimizer's states do not fit the network.
    """
    parameters = dict(network.named_parameters())
    _check_weights(released.weights, network.state_dict(), "weights")
    if released.ema is not None:
        _check_weights(released.ema, parameters, "EMA")
    state = _adam_state(released.optimizer, list(parameters.values()))
    network.load_state_dict(released.weights)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    averaged = released.ema if released.ema is not None else {name: p.detach() for name, p in parameters.items()}
    ema.load_state_dict({"weights": averaged, "num_updates": released.num_steps})


def _tensors(content: Any, *, path: str | Path, part: str) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InvalidValue(f"{path}: the {part} are not a state dict of tensors")
    prefixed = all(name.startswith(_PREFIX) for name in content)
    return {name.removeprefix(_PREFIX) if prefixed else name: tensor for name, tensor in content.items()}


def _optimizer(content: Any, *, path: str | Path) -> dict[str, Any]:
    if not isinstance(content, dict) or content.keys() != {"state", "param_groups"}:
        raise InvalidValue(f"{path}: the second entry is not the state of an optimizer")
    if any(not {"step", "exp_avg", "exp_avg_sq"} <= state.keys() for state in content["state"].values()):
        raise InvalidValue(f"{path}: the optimizer is not Adam, its states lack step, exp_avg or exp_avg_sq")
    return content


def _check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], part: str) -> None:
    if found := misfits(weights, expected):
        raise InvalidValue(
            f"the {part} are of another network: {found}; check network.kind, network.num_features, data.channels and "
            "noise.num_levels"
        )


def _adam_state(optimizer: dict[str, Any], parameters: list[nn.Parameter]) -> dict[int, dict[str, Tensor]]:
    """Adam's states by index. They are numbered by order of registration, which these networks share."""
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    if len(numbers) != len(parameters):
        raise InvalidValue(f"the optimizer has {len(numbers)} parameters, the network has {len(parameters)}")
    states: dict[int, dict[str, Tensor]] = {}
    for index, (number, parameter) in enumerate(zip(numbers, parameters, strict=True)):
        if number not in optimizer["state"]:
            continue
        state = optimizer["state"][number]
        if any(state[key].shape != parameter.shape for key in ("exp_avg", "exp_avg_sq")):
            raise InvalidValue(
                f"Adam's moments of parameter {index} have shape {list(state['exp_avg'].shape)}, "
                f"the network's parameter has {list(parameter.shape)}"
            )
        states[index] = {
            "step": torch.tensor(float(state["step"])),
            "exp_avg": state["exp_avg"].clone(),
            "exp_avg_sq": state["exp_avg_sq"].clone(),
        }
    return states
