"""The exponential moving average of the weights (Song & Ermon 2020, technique 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """The running average w <- decay w + (1 - decay) parameter, started from a copy of the parameters.

    Args:
        module: The network whose parameters are averaged; pass the network itself, not a DDP wrapper.
        decay: m in [0, 1); 0 keeps a copy of the latest parameters.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the running average must be in [0, 1), got {decay}")
        self.decay = decay
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present parameters; call once after each optimizer step."""
        parameters: list[Tensor] = [parameter for _, parameter in self._matched(module)]
        torch._foreach_lerp_(list(self.weights.values()), parameters, 1 - self.decay)
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        for name, parameter in self._matched(module):
            parameter.copy_(self.weights[name])

    def state_dict(self) -> dict[str, Any]:
        """The average and its number of updates; the tensors are the live ones."""
        return {"weights": dict(self.weights), "num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, keeping this object's devices and types.

        Raises:
            ValueError: A name is missing or unknown, or a shape differs.
        """
        weights: Mapping[str, Tensor] = state["weights"]
        if weights.keys() != self.weights.keys():
            missing, extra = self.weights.keys() - weights.keys(), weights.keys() - self.weights.keys()
            raise ValueError(
                f"these EMA weights belong to another network: missing {sorted(missing)}, extra {sorted(extra)}"
            )
        for name, weight in weights.items():
            needed = self.weights[name].shape
            if weight.shape != needed:
                raise ValueError(f"EMA weight {name} has shape {list(weight.shape)}, the network needs {list(needed)}")
        for name, weight in weights.items():
            self.weights[name].copy_(weight)
        self.num_updates = int(state["num_updates"])

    def _matched(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        named = list(module.named_parameters())
        if [name for name, _ in named] != list(self.weights):
            raise ValueError("the module's parameters are not those that the running average was made from")
        return named
