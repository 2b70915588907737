"""Instance normalization++ (spec oracle 14) and dropout by key."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ncsn.core.networks import layers
from ncsn.core.networks.layers import GroupNorm, KeyedDropout, group_norm_by_image, image_keys
from ncsn.core.networks.refinenet import ConditionalInstanceNormPlus, InstanceNormPlus, instance_norm_plus


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


def test_low_precision_input_is_normalized_in_float32():
    x = random(2, 3, 4, 4).bfloat16()
    norm = InstanceNormPlus(3)
    out = norm(x, torch.zeros(2, dtype=torch.int64))
    assert out.dtype == torch.bfloat16
    once_rounded = norm(x.float(), torch.zeros(2, dtype=torch.int64)).bfloat16()
    torch.testing.assert_close(out, once_rounded, rtol=2**-8, atol=0)


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
    for image in range(5):
        one = functional.group_norm(random(5, 6, 4, 4)[image : image + 1], 3, scale[image], shift[image])
        torch.testing.assert_close(found[0][0][image : image + 1], one)


def test_conditional_table_is_gamma_alpha_beta_by_level():
    torch.manual_seed(0)
    norm = ConditionalInstanceNormPlus(64, num_levels=50)
    gamma, alpha, beta = norm.embed.weight.detach().chunk(3, dim=1)
    for part in (gamma, alpha):
        assert abs(part.mean() - 1) < 4 * 0.02 / math.sqrt(3200)
        assert abs(part.std() - 0.02) < 4 * 0.02 / math.sqrt(2 * 3200)
    assert beta.eq(0).all()
    x, level = random(2, 64, 3, 3), torch.tensor([7, 41])
    expected = instance_norm_plus(x, gamma=gamma[level], alpha=alpha[level], beta=beta[level])
    assert torch.equal(norm(x, level), expected)


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


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def masks(x: Tensor, *, layer: int = 0, shape: tuple[int, int, int] = (16, 16, 16)) -> Tensor:
    """1 where an activation is kept, float64 [B, n]."""
    dropout = KeyedDropout(P)
    dropout.layer = layer
    kept: Tensor = dropout(torch.ones(len(x), *shape), image_keys(x))
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / (1 - P)).item()}
    return (kept > 0).double().flatten(1)


def test_what_a_compiler_fuses_drops_the_same_activations(monkeypatch):
    x, shape = images(3), (3, 5, 7)
    expected = masks(x, layer=4, shape=shape)
    monkeypatch.setattr(layers, "fuses", lambda _: True)
    assert torch.equal(masks(x, layer=4, shape=shape), expected)


def test_the_share_that_is_dropped_is_p() -> None:
    kept = masks(images(64))
    deviation = math.sqrt(P * (1 - P) / kept.numel())
    assert abs(float(kept.mean()) - (1 - P)) < 4 * deviation
    for axis in (0, 1):  # at each place over the images, and in each image
        spread = kept.mean(dim=axis).std() / math.sqrt(P * (1 - P) / kept.shape[axis])
        assert 0.8 < float(spread) < 1.2


def test_images_layers_and_places_have_masks_of_their_own() -> None:
    """Even of images that differ in the last bit of one pixel: correlations are those of independent numbers."""
    x = images(2)
    x[1] = x[0]
    x[1, 0, 0, 0] = torch.nextafter(x[1, 0, 0, 0], torch.tensor(10.0))
    one, other = masks(x)
    for left, right in (
        (one, other),
        (one, masks(x, layer=1)[0]),
        (one[1:], one[:-1]),
        (one[16:], one[:-16]),
        (one[256:], one[:-256]),
    ):
        correlation = torch.corrcoef(torch.stack([left, right]))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(len(left))


def test_a_mask_does_not_depend_on_the_batch_or_on_the_order_in_memory() -> None:
    x = images(6)
    whole = masks(x)
    assert torch.equal(whole, torch.cat([masks(x[:1]), masks(x[1:4]), masks(x[4:])]))
    assert torch.equal(whole, masks(x.contiguous(memory_format=torch.channels_last)))
