"""Score networks that are known in closed form."""

from types import SimpleNamespace

import pytest
import torch


class GaussianScore:
    """Exact score of N(mean, s2 I) data with noise, by level and by sigma."""

    def __init__(self, sigmas: torch.Tensor, *, s2: float, mean: float = 0.0) -> None:
        self.sigmas, self.s2, self.mean, self.calls = sigmas, s2, mean, 0

    def __call__(self, x: torch.Tensor, level=None, *, sigma=None) -> torch.Tensor:
        self.calls += 1
        if level is not None:
            sigma = self.sigmas.to(x.dtype)[level]
        return (self.mean - x) / (self.s2 + sigma.view(-1, *[1] * (x.ndim - 1)) ** 2)


class UnitNoise:
    """Draw number k is the k-th unit vector, so that a linear chain shows the weight of each of its draws."""

    def __init__(self, size: int) -> None:
        self.size, self.asked = size, []

    def __call__(self, step: int) -> torch.Tensor:
        self.asked.append(step)
        z = torch.zeros(1, 1, 1, self.size, dtype=torch.float64)
        z[..., 1 + step] = 1.0
        return z

    def start(self, scale: float) -> torch.Tensor:
        """A start that is one independent draw of standard deviation `scale`."""
        x = torch.zeros(1, 1, 1, self.size, dtype=torch.float64)
        x[..., 0] = scale
        return x


@pytest.fixture(scope="session")
def analytic():
    return SimpleNamespace(GaussianScore=GaussianScore, UnitNoise=UnitNoise)
