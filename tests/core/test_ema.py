"""Running averages of the weights: oracle 23."""

import pytest
import torch
from torch import nn

from ncsn.core.ema import Decay, Ema, half_life, step_decay


def constant(value: float) -> nn.Linear:
    module = nn.Linear(2, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


@pytest.mark.oracle(23)
def test_average_of_a_constant_from_zero():
    ema, module = Ema(constant(0.0), step_decay(0.999)), constant(5.0)
    for _ in range(1000):
        ema.update(module, images_seen=1, batch=1)
    assert ema.num_updates == 1000
    assert ema.weights["weight"].mean().item() == pytest.approx(5 * (1 - 0.999**1000), rel=1e-5)
    assert ema.weights["bias"][0].item() == pytest.approx(5 * 0.6323, rel=1e-4)


def test_other_networks_are_refused_and_nothing_is_written():
    ema = Ema(constant(1.0), step_decay(0.9))
    with pytest.raises(ValueError, match=r"bias.*scale"):
        ema.restore({"weight": torch.zeros(3, 2), "scale": torch.zeros(1)}, num_updates=1)
    assert ema.weights["weight"].eq(1).all() and ema.num_updates == 0


IMAGES = 2**21
HALF = 500_000


def averages(decay: Decay, batch: int) -> tuple[float, float]:
    """The averages of weights that are 0 at first, then 1; and that grow evenly from 0 to 1."""
    constant = growing = 0.0
    for seen in range(batch, IMAGES + batch, batch):
        kept = decay(seen, batch)
        constant = kept * constant + (1 - kept)
        growing = kept * growing + (1 - kept) * seen / IMAGES
    return constant, growing


@pytest.mark.parametrize(("batch", "plain", "ramped"), [(64, 0.674838, 0.932733), (2048, 0.675285, 0.933173)])
def test_a_half_life_in_images_does_not_depend_on_the_batch_size(batch: int, plain: float, ramped: float) -> None:
    constant, growing = averages(half_life(HALF, None), batch)
    assert constant == pytest.approx(1 - 0.5 ** (IMAGES / HALF), abs=1e-12)
    assert growing == pytest.approx(plain, abs=1e-6)
    # In the ramp, weights count by a power g of their time: (g + 1) / (g + 2) = 0.932719 for small batches.
    assert averages(half_life(HALF, 0.05), batch)[1] == pytest.approx(ramped, abs=1e-6)
