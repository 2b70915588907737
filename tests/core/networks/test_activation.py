"""ELU, its derivatives, and what it keeps for the way back."""

from __future__ import annotations

import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from ncsn.core.networks.blocks import elu


def test_values_are_pytorch_s_and_derivatives_those_of_differences() -> None:
    x = torch.tensor([-30.0, -3.0, -0.5, -1e-3, 0.7, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.equal(elu(x), functional.elu(x))
    assert gradcheck(elu, (x,))
    assert gradgradcheck(elu, (x,))


def test_only_the_result_is_kept() -> None:
    kept: list[torch.Tensor] = []
    x = torch.randn(7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = elu(x)
        z = y * y
    z.sum().backward()
    assert {t.data_ptr() for t in kept} == {y.data_ptr()}
    assert torch.allclose(x.grad, 2 * y * torch.where(x > 0, 1.0, x.exp()))
