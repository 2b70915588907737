"""The running average of the weights: spec oracle 23, and chapter 2's oracles of section 2."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ncsn.core.ema import Ema, HalfLife, StepDecay


def constant(value: float) -> nn.Linear:
    module = nn.Linear(2, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


@pytest.mark.oracle(23)
def test_average_of_a_constant_from_zero():
    ema, module = Ema(constant(0.0), StepDecay(0.999)), constant(5.0)
    for _ in range(1000):
        ema.update(module, images_seen=1, batch=1)
    assert ema.num_updates == 1000
    assert ema.weights["weight"].mean().item() == pytest.approx(5 * (1 - 0.999**1000), rel=1e-5)
    assert ema.weights["bias"][0].item() == pytest.approx(5 * 0.6323, rel=1e-4)


def test_starts_as_a_copy_that_does_not_follow_the_module():
    module = constant(2.0)
    ema = Ema(module, StepDecay(0.9))
    with torch.no_grad():
        module.weight.fill_(7.0)
    assert ema.weights["weight"].eq(2).all()
    ema.update(module, images_seen=1, batch=1)
    assert ema.weights["weight"].eq(2.5).all() and not ema.weights["weight"].requires_grad


def test_restored_average_goes_on_bitwise():
    torch.manual_seed(0)
    path = [nn.Linear(3, 3) for _ in range(6)]
    ema = Ema(path[0], StepDecay(0.97))
    for module in path[1:3]:
        ema.update(module, images_seen=1, batch=1)
    other = Ema(nn.Linear(3, 3), StepDecay(0.97))
    other.load_state_dict({**ema.state_dict(), "weights": {k: v.clone() for k, v in ema.weights.items()}})
    for module in path[3:]:
        ema.update(module, images_seen=1, batch=1)
        other.update(module, images_seen=1, batch=1)
    assert other.num_updates == 5
    target = nn.Linear(3, 3)
    other.copy_to(target)
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, ema.weights[name]) and parameter.requires_grad


def test_other_networks_are_refused_and_nothing_is_written():
    ema = Ema(constant(1.0), StepDecay(0.9))
    with pytest.raises(ValueError, match=r"bias.*scale"):
        ema.load_state_dict({"weights": {"weight": torch.zeros(3, 2), "scale": torch.zeros(1)}, "num_updates": 1})
    with pytest.raises(ValueError, match=r"bias.*\[2\].*\[3\]"):
        ema.load_state_dict({"weights": {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "num_updates": 1})
    assert ema.weights["weight"].eq(1).all() and ema.num_updates == 0
    with pytest.raises(ValueError, match="parameters"):
        ema.update(nn.Linear(2, 3, bias=False), images_seen=1, batch=1)


IMAGES = 2**21
HALF = 500_000


def averages(profile: HalfLife, batch: int) -> tuple[float, float]:
    """The averages of weights that are 0 at first, then 1; and that grow evenly from 0 to 1."""
    constant = growing = 0.0
    for seen in range(batch, IMAGES + batch, batch):
        kept = profile.decay(images_seen=seen, batch=batch)
        constant = kept * constant + (1 - kept)
        growing = kept * growing + (1 - kept) * seen / IMAGES
    return constant, growing


@pytest.mark.parametrize(
    ("batch", "plain", "ramped"),
    [(64, 0.674838, 0.932733), (128, 0.674853, 0.932747), (512, 0.674939, 0.932832), (2048, 0.675285, 0.933173)],
)
def test_a_half_life_in_images_does_not_depend_on_the_batch_size(batch: int, plain: float, ramped: float) -> None:
    constant, growing = averages(HalfLife(HALF, None), batch)
    assert constant == pytest.approx(1 - 0.5 ** (IMAGES / HALF), abs=1e-12)
    assert 1 - constant == pytest.approx(0.0546246, abs=1e-7)
    assert growing == pytest.approx(plain, abs=1e-6)
    assert averages(HalfLife(HALF, 0.05), batch)[1] == pytest.approx(ramped, abs=1e-6)


def test_the_ramp_is_the_power_function_average() -> None:
    """Its limit for small batches is (gamma + 1) / (gamma + 2) with gamma = ln 2 / r - 1."""
    gamma = math.log(2) / 0.05 - 1
    assert gamma == pytest.approx(12.86294, abs=5e-6)
    assert (gamma + 1) / (gamma + 2) == pytest.approx(0.932719, abs=1e-6)
    assert averages(HalfLife(HALF, 0.05), 64)[1] == pytest.approx((gamma + 1) / (gamma + 2), abs=5e-5)


def test_the_average_of_a_network_follows_its_profile() -> None:
    ema, module = Ema(constant(0.0).double(), HalfLife(1000, 0.5)), constant(1.0).double()
    left = 1.0
    for seen in range(100, 4100, 100):
        ema.update(module, images_seen=seen, batch=100)
        left *= 0.5 ** (100 / min(1000, 0.5 * seen))
    torch.testing.assert_close(ema.weights["bias"], torch.full((3,), 1 - left, dtype=torch.float64), rtol=1e-12, atol=0)
