"""Pixel ranges, spec oracle 16 (dequantization), and the moments of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ncsn.core.images import eight_bit, fit_moments, image_grid, mirror, moment_matched, to_stored, to_unit
from ncsn.core.keyed_random import keyed_normal


def test_to_unit_moves_channels_and_scales():
    images = torch.tensor([[[[0, 51, 255]], [[255, 102, 0]]]], dtype=torch.uint8)
    x = to_unit(images)
    assert x.shape == (1, 3, 2, 1) and x.dtype == torch.float32 and x.is_contiguous()
    torch.testing.assert_close(x[0, :, :, 0], torch.tensor([[0, 1], [0.2, 0.4], [1, 0]]))
    assert images[0, 0, 0, 2] == 255


def test_to_stored_clamps_and_rounds_half_up():
    x = torch.tensor([-0.3, 0.0, 0.49 / 255, 0.5 / 255, 1.5 / 255, 2.0]).view(1, 1, 1, 6)
    assert to_stored(x).flatten().tolist() == [0, 0, 0, 1, 2, 255]


def test_grays_of_dequantized_images():
    """Rounding makes half of the pixels of gray 0 one step too bright; floor(256 x) makes none wrong."""
    u = torch.rand(1, 1, 256, 4000, generator=torch.Generator().manual_seed(0))
    grays = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(1, 256, 4000, 1)
    x = to_unit(grays, u=u)
    assert torch.equal(to_stored(x, dequantized=True), grays)
    rounded = to_stored(x).double().mean(dim=(0, 2, 3))
    for gray, mean in ((0, 0.498), (1, 1.494), (64, 64.25), (128, 128.0), (254, 253.51), (255, 254.50)):
        assert rounded[gray].item() == pytest.approx(mean, abs=0.03)
    ends = torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 4)
    assert to_stored(ends, dequantized=True).flatten().tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_to_stored_refuses_what_is_not_a_number(bad):
    x = torch.zeros(1, 1, 2, 2)
    x[0, 0, 1, 1] = bad
    with pytest.raises(ValueError, match="1 of 4"):
        to_stored(x)


@pytest.mark.oracle(16)
def test_dequantized_gray_is_always_recovered():
    grays = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2000, 16, 16, 1)
    u = torch.rand(2000, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    u[:2] = torch.tensor([2.0**-24, 1 - 2.0**-24]).view(2, 1, 1, 1)  # the ends of the noise
    spread = to_unit(grays, u=u)
    assert spread.min() >= 0 and spread.max() < 1
    misses = (256 * spread).floor() != grays.permute(0, 3, 1, 2)
    assert int(misses.sum()) == 0, "512,000 draws: the spec allows 4 misses in float32, this form has none"


@pytest.mark.parametrize(
    ("dtype", "limits"),
    [
        ("uint8", (0, 255)),
        ("uint16", (0, 65535)),
        ("uint16", (0, 4095)),
        ("uint16", (100, 30000)),
        ("float32", (-1024, 3071)),
    ],
)
def test_every_stored_value_comes_back(dtype: str, limits: tuple[float, float]) -> None:
    low, high = limits
    values = torch.arange(low, high + 1, dtype=torch.float32)[: 2 * ((int(high - low) + 1) // 2)]
    stored = values.view(1, 2, -1, 1).to(getattr(torch, dtype))
    x = to_unit(stored, limits)
    assert (
        x.shape == (1, 1, 2, len(values) // 2) and float(x.min()) == 0 and 1 - 2 / (high - low) <= float(x.max()) <= 1
    )
    back = to_stored(x, dtype=dtype, limits=limits)
    assert back.dtype == stored.dtype
    torch.testing.assert_close(back.float(), values.view_as(stored), rtol=0, atol=1e-3 if dtype == "float32" else 0)
    assert torch.equal(
        to_stored(torch.tensor([[[[-1.0, 2.0]]]]), dtype=dtype, limits=limits).flatten().float(),
        torch.tensor([low, high]).float(),
    )
    if dtype != "float32":
        u = torch.rand(1, 1, 2, len(values) // 2, generator=torch.Generator().manual_seed(0)).clamp(1e-2)
        spread = to_unit(stored, limits, u=u)
        assert float(spread.min()) >= 0 and float(spread.max()) < 1
        whole = to_stored(spread, dtype=dtype, limits=limits, dequantized=True)
        assert torch.equal(whole.float(), values.view_as(stored))


def test_values_as_bytes() -> None:
    assert eight_bit(np.array([0, 2048, 4095, 9999], np.uint16), (0, 4095)).tolist() == [0, 128, 255, 255]
    assert eight_bit(np.array([-1.0, 0.0, 1.0], np.float32), (-1, 1)).tolist() == [0, 128, 255]
    grays = np.arange(256, dtype=np.uint8)
    assert eight_bit(grays, (0, 255)) is grays


def test_mirror_flips_the_chosen_images_left_to_right():
    x = torch.arange(8.0).view(2, 1, 2, 2)
    mirrored = mirror(x, torch.tensor([False, True]))
    assert mirrored.flatten().tolist() == [0, 1, 2, 3, 5, 4, 7, 6]


def test_grid_places_images_row_by_row():
    images = np.arange(1, 4, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(2, axis=2)
    grid = image_grid(images, columns=2)
    assert grid[:, :, 0].tolist() == [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 2, 2, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 3, 3, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    many = np.concatenate([images] * 5, axis=3) + np.arange(5, dtype=np.uint8)
    assert np.array_equal(image_grid(many, columns=2), image_grid(many[..., :3], columns=2))
    assert np.array_equal(image_grid(many[..., :2], columns=2), image_grid(images, columns=2))
    assert image_grid(torch.from_numpy(images), columns=9, padding=0).shape == (1, 6, 1)


def correlated(count, *, size=6):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(size, size, generator=generator)
    points = torch.randn(count, size, generator=generator) @ mixing.T + torch.arange(size)
    return points.view(count, 1, 2, size // 2)


@pytest.mark.parametrize("count", [4, 50])
def test_all_components_give_the_whole_covariance(count):
    x = correlated(count)
    moments = fit_moments(x, num_components=6)
    v = moments.directions
    kept = v.T @ torch.diag(moments.variances - moments.rest) @ v + moments.rest * torch.eye(6)
    if count > 6:
        torch.testing.assert_close(kept, x.flatten(1).T.cov(), rtol=1e-4, atol=1e-4)
    fewer = fit_moments(x, num_components=2)
    for total in (float(torch.trace(kept)), float(fewer.variances.sum()) + 4 * fewer.rest):
        assert total == pytest.approx(torch.trace(x.flatten(1).T.cov()).item(), rel=1e-5)
    torch.testing.assert_close(moments.mean, x.mean(dim=0))
    torch.testing.assert_close(v @ v.T, torch.eye(len(v)), rtol=0, atol=1e-5)
    assert (moments.variances.diff() <= 0).all()


def test_the_leading_components_of_large_images_are_those_of_the_svd():
    draw = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, 301) ** -1.0  # slower than that of photographs
    points = torch.randn(400, 300, generator=draw) * spectrum @ torch.randn(300, 1200, generator=draw)
    moments = fit_moments(points.view(400, 3, 20, 20))
    _, singular, directions = torch.linalg.svd((points - points.mean(dim=0)).double(), full_matrices=False)
    expected = (singular.square() / 399)[:64]
    torch.testing.assert_close(moments.variances.double(), expected, rtol=1e-3, atol=0)
    assert ((moments.directions.double() @ directions[:48].T).square().sum(dim=0) > 0.999).all()


def test_draws_have_the_mean_and_covariance_of_data_plus_noise():
    x = correlated(500)
    moments = fit_moments(x, num_components=6)
    z = keyed_normal(0, stream=0, first=0, count=200_000, size=6).view(-1, 1, 2, 3)
    start = moment_matched(moments, sigma=1.5, z=z)
    target = x.flatten(1).T.cov() + 1.5**2 * torch.eye(6)
    assert (start.flatten(1).T.cov() - target).abs().max() < 0.02 * target.abs().max()
    torch.testing.assert_close(start.mean(dim=0), x.mean(dim=0), rtol=0, atol=0.05)


def test_one_image_has_no_moments():
    with pytest.raises(ValueError, match=r"images.*\b1\b"):
        fit_moments(correlated(1))
