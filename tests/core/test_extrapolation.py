"""Neon: the merged weights, where their figure is least, and what self-training shows on Gaussians and on digits."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ncsn.core.ema import Ema, HalfLife
from ncsn.core.extrapolation import extrapolated, lowest_point
from ncsn.core.images import fit_moments
from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.losses import Batch, DenoisingScoreMatching, EdmWeight
from ncsn.core.networks.preconditioned import PreconditionedNetwork
from ncsn.core.samplers.chain import sample, start
from ncsn.core.samplers.settings import KarrasHeun
from ncsn.core.training import StepOptions, TrainState, train_step
from ncsn.core.training_noise import LognormalNoise


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


WIDTH, FREQUENCIES, SIGMA_DATA, BATCH = 128, 12, 0.423, 128


class DigitsNetwork(PreconditionedNetwork):
    """A residual perceptron for 64 pixels."""

    def __init__(self) -> None:
        super().__init__(sigmas=torch.tensor([3.0, 0.03]), sigma_data=SIGMA_DATA, dropout=0.0)
        self.into = nn.Linear(64 + 2 * FREQUENCIES, WIDTH)
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.out = nn.Linear(WIDTH, 64)
        nn.init.zeros_(self.out.weight)

    def _raw(self, x: Tensor, c_noise: Tensor, *_: object, **__: object) -> Tensor:
        angles = c_noise[:, None] * torch.logspace(-0.3, 1.3, FREQUENCIES)
        h = nn.functional.silu(self.into(torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1)))
        for layer in self.inner:
            h = h + nn.functional.silu(layer(h))
        return self.out(h).view(x.shape)


def train(
    network: nn.Module, images: Tensor, *, steps: int, rate: float, ema: HalfLife, falls: bool, seed: int
) -> nn.Module:
    """With the weight and the noise of Karras et al.; returns the average."""
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    state = TrainState(network, optimizer, Ema(network, ema))
    noise, loss = (
        LognormalNoise(mean=-1.367, std=1.2, stratified=True),
        DenoisingScoreMatching(weight=EdmWeight(SIGMA_DATA)),
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if falls:
            optimizer.param_groups[0]["lr"] = rate * (0.5 + 0.5 * np.cos(np.pi * step / steps))
        sigma, _ = noise.draw(seed, first=step * BATCH, count=BATCH)
        x = images[torch.randint(len(images), (BATCH,), generator=generator)]
        batch = Batch(x=x, sigma=sigma, z=torch.randn(x.shape, generator=generator))
        train_step(network, batch, state=state, loss=loss, options=StepOptions())
        state.images_seen += BATCH
    return state.averaged()


def sampled(network: nn.Module, images: Tensor, *, count: int, seed: int) -> Tensor:
    sampler, sigmas = KarrasHeun(denoise=False), torch.tensor([3.0, 0.03])
    noise = KeyedNoise(seed, first=0, count=count, shape=(1, 8, 8))
    x = start(sampler, fit_moments(images), sigma_1=3.0, noise=noise)
    return sample(sampler, network, x=x, sigmas=sigmas, noise=noise)


def distance(one: Tensor, other: Tensor) -> float:
    """Fréchet distance of the pixels in [-1, 1]."""
    a, b = (2 * each.flatten(1).double().numpy() for each in (one, other))
    s, t = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(s)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * cross)


def test_digits_are_nearer_to_the_data_after_extrapolation() -> None:
    """Measured: distances 0.81 for w = -1, 0.55 for 0, 0.44 for 1, 0.46 for 1.5, 1.00 for 3; to test 0.86 and 0.76."""
    torch.manual_seed(0)
    chosen = np.random.default_rng(0).permutation(1797)[:1258]
    pixels = torch.from_numpy(load_digits().images[chosen]).float()[:, None] / 16
    base = train(DigitsNetwork(), pixels, steps=600, rate=2e-3, ema=HalfLife(500_000, 0.05), falls=True, seed=0)
    own = sampled(base, pixels, count=1258, seed=1)
    self_trained = train(
        copy.deepcopy(base).train(), own, steps=94, rate=2e-4, ema=HalfLife(1000, None), falls=False, seed=1
    )
    weights, moved = (dict(each.named_parameters()) for each in (base, self_trained))
    found: Mapping[float, float] = {
        w: _measured(base, extrapolated(weights, moved, w), pixels) for w in (-1, 0, 1, 1.5, 3)
    }
    assert found[1] < 0.85 * found[0] and found[-1] > 1.2 * found[0] and found[3] > found[1.5], found
    assert 0.5 < lowest_point({w: value for w, value in found.items() if w >= 0}) < 2.5


@torch.no_grad()
def _measured(network: nn.Module, weights: Mapping[str, Tensor], pixels: Tensor) -> float:
    merged = copy.deepcopy(network)
    merged.load_state_dict(dict(weights), strict=False)
    return distance(sampled(merged, pixels, count=2000, seed=2), pixels)
