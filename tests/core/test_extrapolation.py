"""Neon: the merged weights, where their figure is least, and what self-training shows on Gaussians and on digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ncsn.core.extrapolation import extrapolated, lowest_point
from ncsn.core.losses import Batch, DenoisingScoreMatching


def test_the_ends_are_the_two_networks_to_the_last_bit() -> None:
    one, other = ({"a": torch.randn(100, 7), "b": torch.randn(3)} for _ in range(2))
    for w, expected in ((0.0, one), (-1.0, other)):
        merged = extrapolated(one, other, w)
        assert all(torch.equal(merged[name], expected[name]) for name in one)
    torch.testing.assert_close(extrapolated(one, other, 1.5)["a"], one["a"] - 1.5 * (other["a"] - one["a"]))
    with pytest.raises(ValueError, match=r"\(b\)"):
        extrapolated(one, {"a": one["a"]}, 1.0)


def test_the_least_value_is_between_the_places() -> None:
    assert lowest_point({0.5: 0.545, 1.0: 0.4635, 2.0: 0.478}) == pytest.approx(1.44, abs=0.005)
    assert lowest_point({w: (w - 1.3) ** 2 for w in (0.0, 0.5, 1.0, 1.5, 3.0)}) == pytest.approx(1.3)
    assert lowest_point({0.0: 1.0, 0.5: 2.0, 1.0: 3.0}) == 0.0
    assert lowest_point({0.0: 3.0, 0.5: 2.0, 3.0: 1.0}) == 3.0


KEPT, SHARE = 0.96, 0.9  # of the variance: by the sampler, and that the network knows of the data's


def test_variance_of_an_extrapolated_gaussian() -> None:
    base, self_trained = {"v": torch.tensor([SHARE])}, {"v": torch.tensor([KEPT * SHARE])}
    for w, expected in ((0.5, 0.918), (1.0, 0.936), (2.0, 0.972), ((1 / SHARE - 1) / (1 - KEPT), 1.0)):
        assert float(extrapolated(base, self_trained, w)["v"]) == pytest.approx(expected, abs=1e-6)


class GaussianNetwork(nn.Module):
    """The score of N(0, v I), with v as its only parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.tensor([SHARE]))

    def forward(self, x: Tensor, *, sigma: Tensor, level: Tensor | None = None) -> Tensor:
        return -x / (self.v + sigma.square()[:, None, None, None])


def test_a_trained_gaussian_network_reaches_the_best_multiple() -> None:
    network = GaussianNetwork()
    base = {"v": network.v.detach().clone()}
    # All pairs of quantiles of image and noise: their means are those of the distribution.
    quantiles = torch.special.ndtri((torch.arange(200) + 0.5) / 200)
    x, z = torch.meshgrid(
        quantiles / quantiles.std() * (KEPT * SHARE) ** 0.5, quantiles / quantiles.std(), indexing="ij"
    )
    batch = Batch(x=x.reshape(-1, 1, 1, 1), sigma=torch.full((x.numel(),), 0.3), z=z.reshape(-1, 1, 1, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(100):
        optimizer.zero_grad()
        DenoisingScoreMatching()(network, batch).loss.backward()
        optimizer.step()
    places = np.linspace(0, 6, 61)
    far = [abs(float(extrapolated(base, {"v": network.v.detach()}, w)["v"]) - 1.0) for w in places]
    assert places[int(np.argmin(far))] == pytest.approx(2.7778, rel=0.3)
