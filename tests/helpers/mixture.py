"""The two-dimensional mixture of Song & Ermon (2019), Figure 3, with its exact score, chains and a small network.

States are [N, 2] here, and functions of the core that are written for images take them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ncsn.core.ema import Ema, StepDecay
from ncsn.core.losses import Batch, DenoisingScoreMatching
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.langevin import annealed_langevin, langevin_step
from ncsn.core.training import StepOptions, TrainState, train_step


@dataclass(frozen=True)
class GaussianMixture:
    """Isotropic Gaussians with one standard deviation."""

    means: Tensor  # [K, D]
    weights: Tensor  # [K], summing to 1
    std: float = 1.0

    def log_density(self, x: Tensor, *, std: Tensor | float | None = None) -> Tensor:
        """Log density [N] at x [N, D]; `std` replaces the standard deviation, per row if it is a tensor [N]."""
        variance = self._variance(x, std)
        logits = self._logits(x, variance)
        return torch.logsumexp(logits, dim=1) - 0.5 * x.shape[1] * torch.log(2 * math.pi * variance[:, 0])

    def score(self, x: Tensor, *, std: Tensor | float | None = None) -> Tensor:
        """Gradient of `log_density` in x, [N, D]."""
        variance = self._variance(x, std)
        posterior = torch.softmax(self._logits(x, variance), dim=1)
        return (posterior @ self.means.to(x) - x) / variance

    def sample(self, count: int, *, generator: torch.Generator, std: float | None = None) -> Tensor:
        """`count` points, float32 [count, D]."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return self.means.float()[component] + (self.std if std is None else std) * noise

    def _variance(self, x: Tensor, std: Tensor | float | None) -> Tensor:
        value = torch.as_tensor(self.std if std is None else std, dtype=x.dtype, device=x.device)
        return value.square().expand(len(x))[:, None]

    def _logits(self, x: Tensor, variance: Tensor) -> Tensor:
        distance = (x[:, None] - self.means.to(x)).square().sum(dim=2)
        return self.weights.to(x).log() - distance / (2 * variance)


# The mixture of both figures: 1/5 N((-5, -5), I) + 4/5 N((5, 5), I).
TWO_MODES = GaussianMixture(
    means=torch.tensor([[-5.0, -5.0], [5.0, 5.0]], dtype=torch.float64),
    weights=torch.tensor([0.2, 0.8], dtype=torch.float64),
)


@dataclass(frozen=True)
class ModeReport:
    """Where the points of a sampler are."""

    points: Tensor  # [N, 2]
    weight: float  # share nearest to the mode (5, 5); 0.8 is right
    mean: Tensor  # of these points, [2]
    variance: float  # of these points per coordinate, averaged; 1 is right without added noise


def mode_report(points: Tensor) -> ModeReport:
    """Compare points with `TWO_MODES`."""
    heavy = points[torch.cdist(points, TWO_MODES.means.to(points)).argmin(dim=1) == 1]
    variance = float(heavy.var(dim=0).mean()) if len(heavy) > 1 else math.nan
    return ModeReport(points=points, weight=len(heavy) / len(points), mean=heavy.mean(dim=0), variance=variance)


def figure_3_start(count: int = 1280, *, generator: torch.Generator) -> Tensor:
    """Start of both chains of Figure 3, uniform on [-8, 8]^2."""
    return 16 * torch.rand(count, 2, generator=generator) - 8


# `epsilon` of these functions is the paper's, whose Algorithm 1 takes steps of epsilon / 2.
@torch.no_grad()
def plain_langevin(
    x: Tensor,
    *,
    generator: torch.Generator,
    score: Callable[[Tensor], Tensor] = TWO_MODES.score,
    epsilon: float = 0.1,
    num_steps: int = 1000,
) -> Tensor:
    """Figure 3b: Langevin dynamics with the exact score, which keeps the mode weights of the start."""
    for _ in range(num_steps):
        z = torch.randn(x.shape, generator=generator)
        x = langevin_step(x, score=score(x), step_size=epsilon / 2, z=z)
    return x


def annealed_toy_langevin(
    x: Tensor,
    *,
    generator: torch.Generator,
    epsilon: float = 0.1,
    sigma_1: float = 20.0,
    sigma_L: float = 1.0,
    num_levels: int = 10,
    steps_per_level: int = 100,
) -> Tensor:
    """Figure 3c: annealed Langevin dynamics with exact scores, which finds the weights of the modes."""
    # As in the paper's experiment, sigma is the whole standard deviation of the components, so the last level is the
    # data itself. The levels are those of the paper's appendix; with the 10 to 0.1 of its text the chain diverges.
    sigmas = geometric_sigmas(sigma_1, sigma_L, num_levels)
    return annealed_langevin(
        lambda state, level: TWO_MODES.score(state, std=sigmas[level]),
        x=x,
        sigmas=sigmas,
        epsilon=epsilon / 2,
        steps_per_level=steps_per_level,
        noise=lambda _: torch.randn(x.shape, generator=generator),
        denoise=False,
    )


class ConditionalScoreMlp(nn.Module):
    """A small conditional network of the form f(x, sigma) / sigma, for noise levels [L]."""

    sigmas: Tensor

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__()
        self.register_buffer("sigmas", sigmas.clone())
        self.layers = nn.Sequential(
            *(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()),
            nn.Linear(128, 2),
        )

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Score [N, 2] at x [N, 2] and level int64 [N]."""
        sigma = self.sigmas[level][:, None]
        # 26 is the second moment of the mixture per coordinate, so the input has unit size at every level.
        score: Tensor = self.layers(torch.cat((x / (sigma.square() + 26).sqrt(), sigma.log()), dim=1)) / sigma
        return score


def fit_conditional(
    sigmas: Tensor, *, seed: int = 0, num_steps: int = 6000, batch_size: int = 512, ema_decay: float = 0.999
) -> tuple[ConditionalScoreMlp, Ema]:
    """Denoising score matching on the mixture over all levels: the last weights and their running average."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ConditionalScoreMlp(sigmas)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    state = TrainState(network, optimizer, Ema(network, StepDecay(ema_decay)))
    for _ in range(num_steps):
        x = TWO_MODES.sample(batch_size, generator=generator)
        level = torch.randint(0, len(sigmas), (batch_size,), generator=generator)
        z = torch.randn(batch_size, 2, generator=generator)
        batch = Batch(x, sigmas[level], z, level)
        train_step(network, batch, state=state, loss=DenoisingScoreMatching(), options=StepOptions())
    return network, state.ema
