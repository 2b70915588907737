"""The activation of NCSN and NCSNv2 (2019, appendix A)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def elu(x: Tensor) -> Tensor:
    """Compute x where x is positive, else exp(x) - 1.

    In training it keeps its result, which the next layer keeps too, where PyTorch's keeps its argument, and has no
    exponential on the way back. In bfloat16 a derivative far below 1 is then known to a percent.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return functional.elu(x)
    y: Tensor = _Elu.apply(x)
    return y


class _Elu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = functional.elu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        x_gradient: Tensor = torch.ops.aten.elu_backward(gradients[0], 1.0, 1.0, 1.0, True, y)
        return x_gradient
