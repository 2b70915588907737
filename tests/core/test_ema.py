"""The running average: spec oracle 23, restore and bad states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ncsn.core.training import Ema


def constant(value: float) -> nn.Linear:
    module = nn.Linear(2, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


@pytest.mark.oracle(23)
def test_average_of_a_constant_from_zero():
    ema, module = Ema(constant(0.0), decay=0.999), constant(5.0)
    for _ in range(1000):
        ema.update(module)
    assert ema.num_updates == 1000
    assert ema.weights["weight"].mean().item() == pytest.approx(5 * (1 - 0.999**1000), rel=1e-5)
    assert ema.weights["bias"][0].item() == pytest.approx(5 * 0.6323, rel=1e-4)


def test_starts_as_a_copy_that_does_not_follow_the_module():
    module = constant(2.0)
    ema = Ema(module, decay=0.9)
    with torch.no_grad():
        module.weight.fill_(7.0)
    assert ema.weights["weight"].eq(2).all()
    ema.update(module)
    assert ema.weights["weight"].eq(2.5).all() and not ema.weights["weight"].requires_grad


def test_restored_average_goes_on_bitwise():
    torch.manual_seed(0)
    path = [nn.Linear(3, 3) for _ in range(6)]
    ema = Ema(path[0], decay=0.97)
    for module in path[1:3]:
        ema.update(module)
    other = Ema(nn.Linear(3, 3), decay=0.97)
    other.load_state_dict({**ema.state_dict(), "weights": {k: v.clone() for k, v in ema.weights.items()}})
    for module in path[3:]:
        ema.update(module)
        other.update(module)
    assert other.num_updates == 5
    target = nn.Linear(3, 3)
    other.copy_to(target)
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, ema.weights[name]) and parameter.requires_grad


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        Ema(constant(0.0), decay=decay)


def test_other_networks_are_refused_and_nothing_is_written():
    ema = Ema(constant(1.0), decay=0.9)
    with pytest.raises(ValueError, match=r"missing \['bias'\], extra \['scale'\]"):
        ema.load_state_dict({"weights": {"weight": torch.zeros(3, 2), "scale": torch.zeros(1)}, "num_updates": 1})
    with pytest.raises(ValueError, match=r"bias has shape \[2\], the network needs \[3\]"):
        ema.load_state_dict({"weights": {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "num_updates": 1})
    assert ema.weights["weight"].eq(1).all() and ema.num_updates == 0
    with pytest.raises(ValueError, match="parameters are not those"):
        ema.update(nn.Linear(2, 3, bias=False))
