"""One optimizer step and the running average: spec oracle 23."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from ncsn.core.losses import Batch, DenoisingScoreMatching
from ncsn.core.networks.refinenet import NcsnNetwork
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.training import Ema, StepOptions, TrainState, train_step

SIGMAS = geometric_sigmas(1.0, 0.01, 4)


def setup(lr=1e-3):
    torch.manual_seed(0)
    network = NcsnNetwork(8, channels=1, num_levels=4)
    state = TrainState(network, torch.optim.SGD(network.parameters(), lr=lr), Ema(network, decay=0.9))
    return state, Batch(torch.rand(4, 1, 8, 8), torch.arange(4), torch.randn(4, 1, 8, 8))


def step(state, batch, **how):
    options = StepOptions(**how)
    return train_step(state.network, batch, state=state, loss=DenoisingScoreMatching(), sigmas=SIGMAS, options=options)


def test_step_moves_weights_and_average_and_reports_the_loss_before_it():
    state, batch = setup(lr=1e-4)
    before = copy.deepcopy(dict(state.network.named_parameters()))
    first = step(state, batch)
    for name, parameter in state.network.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 1e-4 * parameter.grad)
        torch.testing.assert_close(state.ema.weights[name], 0.9 * before[name] + 0.1 * parameter)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in state.network.parameters()))
    assert first.grad_norm.item() == pytest.approx(norm, rel=1e-4)
    second = step(state, batch)
    assert second.per_image.mean() < first.per_image.mean() and state.ema.num_updates == 2
    assert not first.per_image.requires_grad


def test_clipping_scales_the_gradient_and_reports_its_norm_from_before():
    state, batch = setup()
    free = step(state, batch)
    state, batch = setup()
    clipped = step(state, batch, grad_clip_norm=0.5)
    assert free.grad_norm > 1 and clipped.grad_norm == free.grad_norm
    assert torch.nn.utils.get_total_norm([p.grad for p in state.network.parameters()]).item() == pytest.approx(
        0.5, rel=1e-4
    )


def test_bfloat16_keeps_weights_and_loss_in_float32():
    state, batch = setup()
    full = step(state, batch)
    state, batch = setup()
    low = step(state, batch, autocast_dtype=torch.bfloat16)
    assert low.per_image.dtype == torch.float32
    torch.testing.assert_close(low.per_image.mean(), full.per_image.mean(), rtol=0.02, atol=0)
    assert not torch.equal(low.per_image, full.per_image)
    assert {p.dtype for p in state.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("microbatch", [1, 3, 4, 9])
def test_parts_of_a_batch_add_up_to_its_gradient(microbatch):
    def double_step(**how):
        state, batch = setup()
        state.network.double()
        state.ema = Ema(state.network, decay=0.9)
        report = step(state, Batch(batch.x.double(), batch.level, batch.z.double()), **how)
        return report, [parameter.grad for parameter in state.network.parameters()]

    (whole, gradients), (parts, sums) = double_step(), double_step(microbatch=microbatch)
    for gradient, added in zip(gradients, sums, strict=True):
        torch.testing.assert_close(added, gradient, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(parts.per_image, whole.per_image)


def test_float16_trains_in_range_and_skips_a_step_whose_gradient_is_not():
    state, batch = setup(lr=1e-4)
    full = step(state, batch)
    moved = [p.detach().clone() for p in state.network.parameters()]

    def scaled(scale):
        state, batch = setup(lr=1e-4)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        half = step(state, batch, autocast_dtype=torch.float16)
        return [p.detach() for p in state.network.parameters()], half, state.scaler

    weights, half, scaler = scaled(2.0**10)
    assert half.per_image.dtype == torch.float32
    torch.testing.assert_close(half.per_image.mean(), full.per_image.mean(), rtol=0.01, atol=0)
    assert half.grad_norm.item() == pytest.approx(full.grad_norm.item(), rel=0.05)
    for after, expected in zip(weights, moved, strict=True):
        torch.testing.assert_close(after, expected, rtol=1e-2, atol=1e-4)
    weights, half, scaler = scaled(2.0**40)
    assert all(
        torch.equal(after, before) for after, before in zip(weights, setup()[0].network.parameters(), strict=True)
    )
    assert half.grad_norm == 0 and scaler.get_scale() == 2.0**39


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
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        Ema(constant(0.0), decay=decay)


def test_other_networks_are_refused_and_nothing_is_written():
    ema = Ema(constant(1.0), decay=0.9)
    with pytest.raises(ValueError, match=r"\['bias'\].*\['scale'\]"):
        ema.load_state_dict({"weights": {"weight": torch.zeros(3, 2), "scale": torch.zeros(1)}, "num_updates": 1})
    with pytest.raises(ValueError, match=r"bias .*\[2\].*\[3\]"):
        ema.load_state_dict({"weights": {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "num_updates": 1})
    assert ema.weights["weight"].eq(1).all() and ema.num_updates == 0
    with pytest.raises(ValueError, match="parameters"):
        ema.update(nn.Linear(2, 3, bias=False))
