"""Pixel ranges, spec oracle 16 (dequantization), and the moments of images."""

import numpy as np
import pytest
import torch

from ncsn.core.images import eight_bit, fit_moments, image_grid, moment_matched, to_stored, to_unit
from ncsn.core.keyed_random import keyed_normal


def test_to_unit_moves_channels_and_scales():
    images = torch.tensor([[[[0, 51, 255]], [[255, 102, 0]]]], dtype=torch.uint8)
    x = to_unit(images)
    assert x.shape == (1, 3, 2, 1) and x.dtype == torch.float32 and x.is_contiguous()
    torch.testing.assert_close(x[0, :, :, 0], torch.tensor([[0, 1], [0.2, 0.4], [1, 0]]))
    assert images[0, 0, 0, 2] == 255


def test_to_stored_clamps_rounds_half_up_and_refuses_what_is_not_a_number():
    x = torch.tensor([-0.3, 0.0, 0.49 / 255, 0.5 / 255, 1.5 / 255, 2.0]).view(1, 1, 1, 6)
    assert to_stored(x).flatten().tolist() == [0, 0, 0, 1, 2, 255]
    for bad in (float("nan"), float("inf"), float("-inf")):
        x[0, 0, 0, 3] = bad
        with pytest.raises(ValueError, match="1 of 6"):
            to_stored(x)


@pytest.mark.oracle(16)
def test_grays_of_dequantized_images():
    """Rounding makes half of the pixels of gray 0 one step too bright; floor(256 x) makes none wrong."""
    u = torch.rand(1, 1, 256, 4000, generator=torch.Generator().manual_seed(0))
    u[..., :2] = torch.tensor([2.0**-24, 1 - 2.0**-24])  # the ends of the noise
    grays = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(1, 256, 4000, 1)
    x = to_unit(grays, u=u)
    assert x.min() >= 0 and x.max() < 1 and torch.equal(to_stored(x, dequantized=True), grays)
    rounded = to_stored(x).double().mean(dim=(0, 2, 3))
    for gray, mean in ((0, 0.498), (128, 128.0), (255, 254.50)):
        assert rounded[gray].item() == pytest.approx(mean, abs=0.03)
    ends = torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 4)
    assert to_stored(ends, dequantized=True).flatten().tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("uint8", 0, 255), ("uint16", 0, 65535), ("uint16", 100, 30000), ("float32", -1024, 3071)],
)
def test_every_stored_value_comes_back(dtype: str, low: int, high: int) -> None:
    stored = torch.arange(low, high + 1, dtype=torch.float32).view(1, 1, -1, 1).to(getattr(torch, dtype))
    kind, limits = {"dtype": dtype, "limits": (low, high)}, (low, high)
    x = to_unit(stored, limits)
    assert float(x.min()) == 0 and float(x.max()) == 1
    back = to_stored(x, **kind)
    assert back.dtype == stored.dtype
    torch.testing.assert_close(back.float(), stored.float(), rtol=0, atol=1e-3 if dtype == "float32" else 0)
    beyond = torch.tensor([[[[-1.0, 2.0]]]])
    assert to_stored(beyond, **kind).flatten().tolist() == [low, high]
    if dtype != "float32":
        u = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).clamp(1e-2)
        spread = to_unit(stored, limits, u=u)
        assert float(spread.min()) >= 0 and float(spread.max()) < 1
        assert torch.equal(to_stored(spread, **kind, dequantized=True), stored)


def test_values_as_bytes() -> None:
    assert eight_bit(np.array([0, 2048, 4095, 9999], np.uint16), (0, 4095)).tolist() == [0, 128, 255, 255]
    assert eight_bit(np.array([-1.0, 0.0, 1.0], np.float32), (-1, 1)).tolist() == [0, 128, 255]
    grays = np.arange(256, dtype=np.uint8)
    assert eight_bit(grays, (0, 255)) is grays


def test_grid_places_images_row_by_row():
    images = np.arange(1, 4, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(2, axis=2)
    black, first, second = [0] * 7, [0, 1, 1, 0, 2, 2, 0], [0, 3, 3, 0, 0, 0, 0]
    assert image_grid(images, columns=2)[:, :, 0].tolist() == [black, first, black, second, black]
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
@pytest.mark.parametrize("num_components", [2, 6])
def test_any_number_of_components_has_the_total_variance(count, num_components):
    x = correlated(count)
    moments = fit_moments(x, num_components=num_components)
    kept = len(moments.variances)
    assert kept == min(num_components, count - 1) and (moments.variances.diff() <= 0).all()
    total = float(moments.variances.sum()) + (6 - kept) * moments.rest
    assert total == pytest.approx(torch.trace(x.flatten(1).T.cov()).item(), rel=1e-5)


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
    with pytest.raises(ValueError, match=r"images.*\b1\b"):
        fit_moments(x[:1])
