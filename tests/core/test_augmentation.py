"""Augmentation: which transforms are drawn, what they do to images, and what the network is told."""

import math

import torch
from torch import Tensor

from ncsn.core.augmentation import Transforms, augmentation_labels, draw_transforms, inverse_maps, sampled

SIZE = 32


def one(**numbers: float) -> Tensor:
    """[1, 8]: nothing but these."""
    a = torch.zeros(1, 8)
    for name, value in numbers.items():
        a[0, int(name[1])] = value
    return a


def noise(*, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(1, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=dtype)


def transform(x: Tensor, a: Tensor) -> Tensor:
    return Transforms.of(a, height=x.shape[2], width=x.shape[3]).apply(x)


def test_shares_and_moments_of_what_is_drawn() -> None:
    p = 0.12
    a = draw_transforms(0, first=0, count=200_000, probability=p, y_flip=True)
    untouched = (~a[:, 1:].any(dim=1)).double().mean()
    expected = (1 - p) ** 4 * (1 - p / 2)
    assert abs(float(untouched) - expected) < 4 * math.sqrt(expected * (1 - expected) / len(a))
    squares = augmentation_labels(a).double().square()
    # Half of the directions of row 5 are 0, so its two labels share p as 3 to 1.
    means = torch.tensor([0.5, p / 2, p, 1.5 * p, p / 2, 0.75 * p, 0.25 * p, p, p], dtype=torch.float64)
    assert ((squares.mean(0) - means).abs() < 4 * squares.std(0) / math.sqrt(len(a))).all()
    turned = augmentation_labels(a)[:, 3].double()
    assert abs(float(turned.mean()) + p) < 4 * float(turned.std()) / math.sqrt(len(a))


def test_nothing_and_flips_are_exact_beside_what_is_resampled() -> None:
    x = noise()
    a = torch.cat((one(), one(a0=1), one(a1=1), one(a0=1, a1=1), one(a3=1)))
    *found, turned = transform(x.expand(5, -1, -1, -1), a)
    torch.testing.assert_close(turned, transform(x, one(a3=1))[0])
    for image, axes in zip(found, ((), (-1,), (-2,), (-1, -2)), strict=True):
        assert torch.equal(image, x[0].flip(axes))


def test_labels_are_the_numbers_with_directions_for_angles() -> None:
    told = augmentation_labels(one(a0=1, a1=1, a2=0.5, a3=0.4, a4=2.0, a5=-0.7, a6=0.3, a7=-0.2))
    turned = (math.cos(0.4) - 1, math.sin(0.4), -0.7 * math.cos(2.0), -0.7 * math.sin(2.0))
    torch.testing.assert_close(told, torch.tensor([[1, 1, 0.5, *turned, 0.3, -0.2]]))
    assert not augmentation_labels(one()).any()


def test_a_quarter_turn() -> None:
    a, x = one(a3=1).double() * -math.pi / 2, noise(dtype=torch.float64)
    torch.testing.assert_close(transform(x, a), x.rot90(-1, (2, 3)), rtol=0, atol=1e-2)
    # Of a rectangle it turns the square in the center.
    wide, center = torch.cat([x] * 2, dim=3), slice(SIZE // 2, SIZE // 2 + SIZE)
    turned = wide[..., center].rot90(-1, (2, 3))
    torch.testing.assert_close(sampled(wide, inverse_maps(a, aspect=2))[..., center], turned, rtol=0, atol=1e-6)
    torch.testing.assert_close(transform(wide, a)[..., center], turned, rtol=0, atol=1e-2)
    high = transform(wide.mT, a)[:, :, center]
    torch.testing.assert_close(high, wide.mT[:, :, center].rot90(-1, (2, 3)), rtol=0, atol=1e-2)


def test_a_translation_by_whole_pixels_continues_by_reflection() -> None:
    x = noise(dtype=torch.float64)
    moved = transform(x, one(a6=8 * 3 / SIZE, a7=-8 * 2 / SIZE))
    torch.testing.assert_close(moved[..., :-2, 3:], x[..., 2:, :-3], rtol=0, atol=1e-2)
    torch.testing.assert_close(moved[..., :-2, :3], x[..., 2:, :3].flip(-1), rtol=0, atol=1e-2)
    torch.testing.assert_close(moved[..., -2:, 3:], x[..., -2:, :-3].flip(-2), rtol=0, atol=1e-2)


def test_linear_parts_are_those_of_the_table() -> None:
    draw = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    stretched = inverse_maps(torch.cat((torch.zeros(5, 4), draw[:, 4:6], torch.zeros(5, 2)), dim=1))[:, :, :2]
    torch.testing.assert_close(torch.linalg.det(stretched), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(stretched.mT, stretched)
    along = torch.stack((draw[:, 4].cos(), draw[:, 4].sin()), dim=1).double()[:, :, None]
    torch.testing.assert_close(stretched @ along, along * 2 ** (-0.2 * draw[:, 5, None, None].double()))
    larger = inverse_maps(one(a2=1))[0, :, :2].inverse()
    torch.testing.assert_close(larger, 2**0.2 * torch.eye(2, dtype=torch.float64))
    # In the order of the table: the translation comes last, so nothing turns it.
    combined = inverse_maps(one(a2=0.5, a3=1.0, a5=-0.7, a6=1.0, a7=0.5))
    point = torch.tensor([0.25, 0.125, 1.0], dtype=torch.float64)
    torch.testing.assert_close(combined[0] @ point, torch.zeros(2, dtype=torch.float64))
