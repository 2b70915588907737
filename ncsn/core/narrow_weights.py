"""Weights in bfloat16 for a training on a GPU."""

from __future__ import annotations

from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ncsn.core.networks.layers import narrowed

# Weights whose gradients are widened together: about a bucket of DistributedDataParallel, 25 MiB in float32, so that
# workers exchange some gradients while they compute others.
_GROUP = 25 * 2**18


class NarrowWeights:
    """Copies in a narrower type of the parameters that autocast would cast in each pass, those of `layers.narrowed`.

    A step fills them from the parameters as they are, and puts them in their place in its passes. Gradients return to
    the parameters in float32.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self._network = network
        self._copies = {
            f"{name}.{own}": torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            for name, layer in narrowed(network).items()
            for own, parameter in layer.named_parameters(recurse=False)
        }

    @torch.no_grad()
    def fill(self) -> None:
        """Copy the parameters, in place: CUDA graphs have the addresses."""
        parameters = dict(self._network.named_parameters())
        torch._foreach_copy_(list(self._copies.values()), [parameters[name] for name in self._copies])

    def of_pass(self) -> dict[str, Tensor]:
        """The copies by name, for one pass through the network."""
        parameters, copies = dict(self._network.named_parameters()), dict(self._copies)
        trained = [name for name in copies if parameters[name].requires_grad]
        ends = accumulate(parameters[name].numel() for name in trained)
        for _, group in groupby(zip(trained, ends, strict=True), key=lambda each: each[1] // _GROUP):
            names = [name for name, _ in group]
            widened = _Widened.apply([copies[name] for name in names], *(parameters[name] for name in names))
            copies.update(zip(names, widened, strict=True))
        for each in copies.values():
            # A compiler of networks in DistributedDataParallel makes a graph for each bucket of parameters.
            each._is_param = True
        return copies


class _Widened(torch.autograd.Function):
    """Copies in place of parameters, whose gradients become float32 together, in a few launches."""

    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.parameters = parameters
        return tuple(each.detach() for each in copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wide = [torch.empty_like(each) for each in ctx.parameters]
        torch._foreach_copy_(wide, gradients)
        return (None, *wide)
