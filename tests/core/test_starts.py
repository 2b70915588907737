"""The moment-matched start against the covariance it stands for."""

from __future__ import annotations

import pytest
import torch

from ncsn.core.images import fit_moments, moment_matched
from ncsn.core.keyed_random import keyed_normal


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
    assert torch.trace(kept).item() == pytest.approx(torch.trace(x.flatten(1).T.cov()).item(), rel=1e-5)
    torch.testing.assert_close(moments.mean, x.mean(dim=0))
    torch.testing.assert_close(v @ v.T, torch.eye(len(v)), rtol=0, atol=1e-5)
    assert (moments.variances.diff() <= 0).all()


def test_fewer_components_keep_the_total_variance():
    x = correlated(500)
    moments = fit_moments(x, num_components=2)
    total = float(moments.variances.sum()) + 4 * moments.rest
    assert total == pytest.approx(torch.trace(x.flatten(1).T.cov()).item(), rel=1e-5)


def test_draws_have_the_mean_and_covariance_of_data_plus_noise():
    x = correlated(500)
    moments = fit_moments(x, num_components=6)
    z = keyed_normal(0, stream=0, first=0, count=200_000, size=6).view(-1, 1, 2, 3)
    start = moment_matched(moments, sigma=1.5, z=z)
    target = x.flatten(1).T.cov() + 1.5**2 * torch.eye(6)
    assert (start.flatten(1).T.cov() - target).abs().max() < 0.02 * target.abs().max()
    torch.testing.assert_close(start.mean(dim=0), x.mean(dim=0), rtol=0, atol=0.05)


def test_one_image_has_no_moments():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        fit_moments(correlated(1))
