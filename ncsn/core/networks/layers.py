"""Layers that are written out where a compiler for a GPU joins their parts with those of their neighbors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Options of torch.compile for a GPU: its kernels compute a map again where they read it. By default one that is read
# more than once goes to memory, in float32, if it takes more than four reads or 30 operations.
FUSION: dict[str, str | int | bool] = {
    "realize_reads_threshold": 16,
    "realize_acc_reads_threshold": 32,
    "realize_opcount_threshold": 100,
}


def narrowed(network: nn.Module) -> dict[str, nn.Module]:
    """Layers by name, of which autocast would cast the parameters in each pass: convolutions and linear layers.

    What a network computes in float32 under autocast too, its `full_precision`, is none of them.
    """
    exact: tuple[str, ...] = getattr(network, "full_precision", ())
    kinds = nn.Conv2d | nn.Linear
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, kinds) and not name.startswith(exact)
    }


def fuses(x: Tensor) -> bool:
    """Whether a compiler for a GPU joins operations on `x` into kernels, so that each costs no pass over it."""
    return x.is_cuda and torch.compiler.is_compiling()


class Conv2d(nn.Conv2d):
    """A convolution that can add a term per image and channel to its shift."""

    def forward(self, x: Tensor, term: Tensor | None = None) -> Tensor:
        """[B, C, H, W] and a term [B, C'] or none to [B, C', H', W']."""
        if self.bias is None or not fuses(x):
            y: Tensor = super().forward(x)
            return y if term is None else y + term.to(y.dtype)[:, :, None, None]
        y = self._conv_forward(x, self.weight, None)
        # The gradient of a shift per image is a sum over its pixels, by the kernel that has the maps at hand. Over the
        # whole batch it takes two more.
        shift = self.bias.float().expand(len(x), -1)
        shift = shift if term is None else shift + term
        return (y + shift[:, :, None, None]).to(y.dtype)
