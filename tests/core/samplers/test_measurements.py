"""Measurements of images: what they see, their adjoints, and what they explain."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from ncsn.core.samplers.restoration import KnownPixels, Operator, blur, means, peak_signal_to_noise

SIZE = 12


def operators() -> dict[str, Operator]:
    mask = torch.arange(SIZE) % 3 > 0
    return {"pixels": KnownPixels(mask), "means": means(SIZE, 3), "blur": blur(SIZE, 1.5)}


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 2, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def matrix(operator: Operator) -> torch.Tensor:
    """A of one channel, by its columns."""
    basis = torch.eye(SIZE * SIZE, dtype=torch.float64).view(-1, 1, SIZE, SIZE)
    return operator.apply(basis).flatten(1).T


@pytest.mark.parametrize("name", ["pixels", "means", "blur"])
def test_the_adjoint_and_the_explanation_are_those_of_the_matrix(name: str) -> None:
    operator = operators()[name]
    a, x = matrix(operator), images()
    y = operator.apply(x)
    torch.testing.assert_close(operator.adjoint(y).flatten(2), y.flatten(2) @ a)
    noise, spread = 0.01, 0.3
    whole = noise * torch.eye(len(a), dtype=torch.float64) + spread * a @ a.T
    expected = torch.linalg.solve(whole, y.flatten(2).flatten(0, 1).T).T @ a
    found = operator.explain(y, noise=noise, spread=spread)
    torch.testing.assert_close(found.flatten(2).flatten(0, 1), expected)


def test_blur_and_means_are_those_of_scipy_and_numpy() -> None:
    x = images(1)
    expected = gaussian_filter(x[0, 0].numpy(), 1.5, mode="reflect")
    np.testing.assert_allclose(blur(SIZE, 1.5).apply(x)[0, 0].numpy(), expected, atol=1e-12)
    wide = gaussian_filter(x[0, 0].numpy(), 5.0, mode="reflect")  # its kernel is wider than the image
    np.testing.assert_allclose(blur(SIZE, 5.0).apply(x)[0, 0].numpy(), wide, atol=1e-12)
    blocks = x[0, 0].numpy().reshape(4, 3, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(means(SIZE, 3).apply(x)[0, 0].numpy(), blocks, atol=1e-12)
    assert means(SIZE, 3).apply(x).shape == (1, 2, 4, 4)


def test_what_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="12"):
        means(SIZE, 5)
    with pytest.raises(ValueError, match="width"):
        blur(SIZE, 0.0)


def test_signal_to_noise_of_known_errors() -> None:
    x = torch.zeros(4)
    assert peak_signal_to_noise(x, x) == math.inf
    assert peak_signal_to_noise(x, x + 0.1) == pytest.approx(20.0)
