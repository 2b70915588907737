"""One optimizer step: what it changes, clips and reports."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from ncsn.core.ema import Ema
from ncsn.core.networks.ncsn import NcsnNetwork
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.train_state import train_step

SIGMAS = geometric_sigmas(1.0, 0.01, 4)


def setup(lr=1e-3):
    torch.manual_seed(0)
    network = NcsnNetwork(8, channels=1, num_levels=4)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    batch = {"x": torch.rand(4, 1, 8, 8), "level": torch.arange(4), "z": torch.randn(4, 1, 8, 8), "sigmas": SIGMAS}
    return network, optimizer, Ema(network, decay=0.9), batch


def test_step_moves_weights_and_average_and_reports_the_loss_before_it():
    network, optimizer, ema, batch = setup(lr=1e-4)
    before = copy.deepcopy(dict(network.named_parameters()))
    first = train_step(network, optimizer=optimizer, ema=ema, **batch)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 1e-4 * parameter.grad)
        torch.testing.assert_close(ema.weights[name], 0.9 * before[name] + 0.1 * parameter)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in network.parameters()))
    assert first.grad_norm.item() == pytest.approx(norm, rel=1e-4)
    assert first.loss.item() == pytest.approx(32 * first.per_image.mean().item(), rel=1e-5)
    second = train_step(network, optimizer=optimizer, ema=ema, **batch)
    assert second.loss < first.loss and ema.num_updates == 2
    assert not (first.loss.requires_grad or first.per_image.requires_grad)


def test_clipping_scales_the_gradient_and_reports_its_norm_from_before():
    network, optimizer, ema, batch = setup()
    free = train_step(network, optimizer=optimizer, ema=ema, **batch)
    network, optimizer, ema, batch = setup()
    clipped = train_step(network, optimizer=optimizer, ema=ema, grad_clip_norm=0.5, **batch)
    assert free.grad_norm > 1 and clipped.grad_norm == free.grad_norm
    assert torch.nn.utils.get_total_norm([p.grad for p in network.parameters()]).item() == pytest.approx(0.5, rel=1e-4)


def test_bfloat16_keeps_weights_and_loss_in_float32():
    network, optimizer, ema, batch = setup()
    full = train_step(network, optimizer=optimizer, ema=ema, **batch)
    network, optimizer, ema, batch = setup()
    low = train_step(network, optimizer=optimizer, ema=ema, autocast_dtype=torch.bfloat16, **batch)
    assert low.loss.dtype == torch.float32 and low.loss.item() == pytest.approx(full.loss.item(), rel=0.02)
    assert low.loss != full.loss
    assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("microbatch", [1, 3, 4, 9])
def test_parts_of_a_batch_add_up_to_its_gradient(microbatch):
    def step(**how):
        network, optimizer, _, batch = setup()
        network.double()
        doubled = {name: value if name == "level" else value.double() for name, value in batch.items()}
        report = train_step(network, optimizer=optimizer, ema=Ema(network, decay=0.9), **doubled, **how)
        return report, [parameter.grad for parameter in network.parameters()]

    (whole, gradients), (parts, sums) = step(), step(microbatch=microbatch)
    for gradient, added in zip(gradients, sums, strict=True):
        torch.testing.assert_close(added, gradient, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(parts.per_image, whole.per_image)
    torch.testing.assert_close(parts.loss, whole.loss)


def test_float16_trains_in_range_and_leaves_out_a_step_whose_gradient_is_not():
    network, optimizer, ema, batch = setup(lr=1e-4)
    full = train_step(network, optimizer=optimizer, ema=ema, **batch)
    moved = [p.detach().clone() for p in network.parameters()]

    def scaled(scale):
        network, optimizer, ema, batch = setup(lr=1e-4)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        half = train_step(network, optimizer=optimizer, ema=ema, autocast_dtype=torch.float16, scaler=scaler, **batch)
        return [p.detach() for p in network.parameters()], half, scaler

    weights, half, scaler = scaled(2.0**10)
    assert half.loss.dtype == torch.float32 and half.loss.item() == pytest.approx(full.loss.item(), rel=0.01)
    assert half.grad_norm.item() == pytest.approx(full.grad_norm.item(), rel=0.05)
    for after, expected in zip(weights, moved, strict=True):
        torch.testing.assert_close(after, expected, rtol=1e-2, atol=1e-4)
    weights, half, scaler = scaled(2.0**40)
    assert all(torch.equal(after, before) for after, before in zip(weights, setup()[0].parameters(), strict=True))
    assert half.grad_norm == 0 and scaler.get_scale() == 2.0**39
