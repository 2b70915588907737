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
