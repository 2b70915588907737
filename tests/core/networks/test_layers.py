"""Instance normalization++ (spec oracle 14) and dropout by key."""

import math

import pytest
import torch
from torch import Tensor

from ncsn.core.networks import layers
from ncsn.core.networks.layers import GroupNorm, KeyedDropout, group_norm_by_image, image_keys
from ncsn.core.networks.refinenet import ConditionalInstanceNormPlus, instance_norm_plus


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.oracle(14)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 3 * 3 / math.sqrt(1e-5) * 2**-23),  # gamma x / sqrt(eps): the mean is folded into the shift
    ],
)
def test_constant_channels_leave_only_the_standardized_means(dtype, tolerance):
    x = torch.tensor([1.0, 3.0], dtype=dtype).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    gamma, alpha, beta = torch.tensor([[2.0, 3.0], [0.5, 1.0], [0.1, -0.1]], dtype=dtype)
    out = instance_norm_plus(x, gamma=gamma, alpha=alpha, beta=beta)
    # The unbiased variance of (1, 3) is 2: a divisor of C would give +-1 instead of +-0.70711.
    root = 1 / math.sqrt(2 + 1e-5)
    expected = torch.tensor([2 * 0.5 * -root + 0.1, 3 * 1.0 * root - 0.1], dtype=dtype)
    torch.testing.assert_close(out, expected.view(1, 2, 1, 1).expand_as(out), rtol=0, atol=tolerance)


def test_more_groups_than_one_call_takes_are_normalized_in_parts(monkeypatch):
    scale, shift = random(5, 6, seed=1), random(5, 6, seed=2)
    found = []
    for most in (65_535, 7):  # 3 groups an image: 5 images at once, or 2, 2 and 1
        monkeypatch.setattr(layers, "_MOST_GROUPS", most)
        x = random(5, 6, 4, 4).requires_grad_()
        y = group_norm_by_image(x, groups=3, scale=scale, shift=shift)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_fresh_conditional_norm_nearly_changes_nothing():
    torch.manual_seed(0)
    gamma, alpha, beta = ConditionalInstanceNormPlus(64, num_levels=50).embed.weight.detach().chunk(3, dim=1)
    for part in (gamma, alpha):
        assert abs(part.mean() - 1) < 4 * 0.02 / math.sqrt(3200)
        assert abs(part.std() - 0.02) < 4 * 0.02 / math.sqrt(2 * 3200)
    assert beta.eq(0).all()


@pytest.mark.parametrize("by_image", [False, True])
def test_what_a_compiler_fuses_is_group_norm_with_its_gradients(by_image, monkeypatch):
    found, norm = [], GroupNorm(3, 12, eps=1e-5)
    for written_out in (False, True):
        monkeypatch.setattr(layers, "fuses", lambda _, answer=written_out: answer)
        x = (random(4, 12, 5, 6) + 30).double().contiguous(memory_format=torch.channels_last).requires_grad_()
        scale, shift = (random(4, 12, seed=seed).double()[: 4 if by_image else 1].requires_grad_() for seed in (1, 2))
        norm.weight, norm.bias = (torch.nn.Parameter(each[0].detach()) for each in (scale, shift))
        y = group_norm_by_image(x, groups=3, scale=scale, shift=shift) if by_image else norm(x)
        (y * random(4, 12, 5, 6, seed=3)).sum().backward()
        parameters = (scale, shift) if by_image else (norm.weight, norm.bias)
        found.append((y.detach(), x.grad, *(each.grad for each in parameters)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    assert not torch.equal(found[1][0], found[0][0])


P = 0.3


def masks(x: Tensor, *, layer: int = 0, shape: tuple[int, int, int] = (16, 16, 16)) -> Tensor:
    """1 where an activation is kept, float64 [B, n]."""
    dropout = KeyedDropout(P)
    dropout.layer = layer
    kept: Tensor = dropout(torch.ones(len(x), *shape), image_keys(x))
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / (1 - P)).item()}
    return (kept > 0).double().flatten(1)


def test_what_a_compiler_fuses_drops_the_same_activations(monkeypatch):
    x, shape = random(3, 3, 8, 8), (3, 5, 7)
    expected = masks(x, layer=4, shape=shape)
    monkeypatch.setattr(layers, "fuses", lambda _: True)
    assert torch.equal(masks(x, layer=4, shape=shape), expected)


def test_each_image_drops_its_own_share_in_any_batch_and_order_in_memory() -> None:
    x = random(64, 3, 8, 8)
    kept = masks(x)
    assert abs(float(kept.mean()) - (1 - P)) < 4 * math.sqrt(P * (1 - P) / kept.numel())
    for axis in (0, 1):  # at each place over the images, and in each image
        spread = kept.mean(dim=axis).std() / math.sqrt(P * (1 - P) / kept.shape[axis])
        assert 0.8 < float(spread) < 1.2
    assert torch.equal(kept[1:4], masks(x[1:4]))
    assert torch.equal(kept, masks(x.contiguous(memory_format=torch.channels_last)))


def test_images_layers_and_places_have_masks_of_their_own() -> None:
    """Even of images that differ in the last bit of one pixel: correlations are those of independent numbers."""
    x = random(1, 3, 8, 8).repeat(2, 1, 1, 1)
    x[1, 0, 0, 0] = torch.nextafter(x[1, 0, 0, 0], torch.tensor(10.0))
    one, other = masks(x)
    pairs = [(one, other), (one, masks(x, layer=1)[0]), *((one[shift:], one[:-shift]) for shift in (1, 16, 256))]
    for left, right in pairs:
        correlation = torch.corrcoef(torch.stack([left, right]))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(len(left))
