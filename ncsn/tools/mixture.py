"""The paper's two-dimensional experiments (Song & Ermon 2019, Figures 2 and 3): a mixture whose score is known.

States are [N, 2] here, and functions of the core that are written for images take them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ncsn.core.langevin import annealed_langevin, langevin_step
from ncsn.core.losses import Batch, DenoisingScoreMatching, SlicedScoreMatching
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.training import Ema, StepOptions, TrainState, train_step


@dataclass(frozen=True)
class GaussianMixture:
    """Isotropic Gaussians with one standard deviation.

    Attributes:
        means: [K, D].
        weights: [K], summing to 1.
        std: Standard deviation of each component without added noise.
    """

    means: Tensor
    weights: Tensor
    std: float = 1.0

    def log_density(self, x: Tensor, *, std: Tensor | float | None = None) -> Tensor:
        """Log density [N] at x [N, D]; `std` replaces the components' standard deviation, per row if a tensor [N]."""
        variance = self._variance(x, std)
        logits = self._logits(x, variance)
        return torch.logsumexp(logits, dim=1) - 0.5 * x.shape[1] * torch.log(2 * math.pi * variance[:, 0])

    def score(self, x: Tensor, *, std: Tensor | float | None = None) -> Tensor:
        """Gradient of `log_density` in x, [N, D]."""
        variance = self._variance(x, std)
        return (self._posterior(x, variance) @ self.means.to(x) - x) / variance

    def noisy_score(self, x: Tensor, *, sigma: Tensor | float) -> Tensor:
        """Score of the mixture with added noise of standard deviation sigma, a number or [N]."""
        return self.score(x, std=self._noisy_std(sigma))

    def denoised(self, x: Tensor, *, sigma: float) -> Tensor:
        """Exact posterior mean of the clean point given x with added noise sigma, [N, D]."""
        posterior = self._posterior(x, self._variance(x, self._noisy_std(sigma)))
        return (posterior @ self.means.to(x) * sigma**2 + x * self.std**2) / (self.std**2 + sigma**2)

    def nearest_mode(self, x: Tensor) -> Tensor:
        """Index of the nearest mean, int64 [N]."""
        return torch.cdist(x, self.means.to(x)).argmin(dim=1)

    def sample(self, count: int, *, generator: torch.Generator, std: float | None = None) -> Tensor:
        """Draw `count` points, float32 [count, D]."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return self.means.float()[component] + (self.std if std is None else std) * noise

    def _noisy_std(self, sigma: Tensor | float) -> Tensor | float:
        return (self.std**2 + sigma**2) ** 0.5

    def _variance(self, x: Tensor, std: Tensor | float | None) -> Tensor:
        value = torch.as_tensor(self.std if std is None else std, dtype=x.dtype, device=x.device)
        return value.square().expand(len(x))[:, None]

    def _logits(self, x: Tensor, variance: Tensor) -> Tensor:
        distance = (x[:, None] - self.means.to(x)).square().sum(dim=2)
        return self.weights.to(x).log() - distance / (2 * variance)

    def _posterior(self, x: Tensor, variance: Tensor) -> Tensor:
        return torch.softmax(self._logits(x, variance), dim=1)


TWO_MODES = GaussianMixture(
    means=torch.tensor([[-5.0, -5.0], [5.0, 5.0]], dtype=torch.float64),
    weights=torch.tensor([0.2, 0.8], dtype=torch.float64),
)
"""The mixture of both figures: 1/5 N((-5, -5), I) + 4/5 N((5, 5), I)."""

LEARNED_SIGMAS = geometric_sigmas(10.0, 0.1, 10)
"""Added noise at which a conditional network learns the mixture."""
LEARNED_EPSILON = 1e-3
"""Step size at the last of these levels, in the form of the paper's Algorithm 1."""


@dataclass(frozen=True)
class ModeReport:
    """Where a sampler's points ended.

    Attributes:
        points: [N, 2].
        weight: Share nearest to the mode (5, 5); the truth is 0.8.
        mean: Mean of these points, [2].
        variance: Their variance per coordinate, averaged; the truth is 1 without added noise.
    """

    points: Tensor
    weight: float
    mean: Tensor
    variance: float


def mode_report(points: Tensor) -> ModeReport:
    """Measure points against `TWO_MODES`."""
    heavy = points[TWO_MODES.nearest_mode(points) == 1]
    variance = float(heavy.var(dim=0).mean()) if len(heavy) > 1 else math.nan
    return ModeReport(points=points, weight=len(heavy) / len(points), mean=heavy.mean(dim=0), variance=variance)


def figure_3_start(count: int = 1280, *, generator: torch.Generator) -> Tensor:
    """Start of both chains of Figure 3, uniform on [-8, 8]^2."""
    return 16 * torch.rand(count, 2, generator=generator) - 8


@torch.no_grad()
def plain_langevin(
    x: Tensor,
    *,
    generator: torch.Generator,
    score: Callable[[Tensor], Tensor] = TWO_MODES.score,
    epsilon: float = 0.1,
    num_steps: int = 1000,
) -> Tensor:
    """Figure 3b: Langevin dynamics with the exact score, which leaves the modes' weights as the start had them.

    `epsilon` is the paper's, of whose Algorithm 1 a step is epsilon / 2.
    """
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
    """Figure 3c: annealed Langevin dynamics with exact scores, which finds the modes' weights.

    A level's sigma is the components' whole standard deviation, as in the paper's experiment, so the last level is the
    data itself. The levels are those of the paper's appendix; with the 10 to 0.1 of its text the chain diverges.
    `epsilon` is the paper's, of whose Algorithm 1 a step is epsilon / 2.
    """
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


def annealed_learned_langevin(x: Tensor, *, network: ConditionalScoreMlp, generator: torch.Generator) -> Tensor:
    """Figure 3c with a learned score, whose levels are of noise that is added to the mixture.

    100 steps per level of `LEARNED_EPSILON` in the paper's form.
    """
    return annealed_langevin(
        network,
        x=x,
        sigmas=network.sigmas,
        epsilon=LEARNED_EPSILON / 2,
        steps_per_level=100,
        noise=lambda _: torch.randn(x.shape, generator=generator),
        denoise=False,
    )


class PlainScoreMlp(nn.Sequential):
    """The unconditional network of Figure 2: 2-128-128-2 with softplus."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 128), nn.Softplus(), nn.Linear(128, 128), nn.Softplus(), nn.Linear(128, 2))

    def score(self, x: Tensor, _level: Tensor) -> Tensor:
        """Score [N, 2] at x [N, 2]."""
        score: Tensor = self(x)
        return score


def fit_figure_2(*, seed: int = 0, num_steps: int = 10_000, batch_size: int = 128) -> PlainScoreMlp:
    """Figure 2: sliced score matching on the clean mixture. The score comes out right only where there is data."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PlainScoreMlp()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    level, sigmas, z = torch.zeros(batch_size, dtype=torch.int64), torch.zeros(1), torch.zeros(batch_size, 2)
    for _ in range(num_steps):
        x = TWO_MODES.sample(batch_size, generator=generator)
        v = torch.randn(1, batch_size, 2, generator=generator)
        optimizer.zero_grad()
        value = SlicedScoreMatching(anneal_power=0.0)(network.score, Batch(x, level, z, v), sigmas)
        torch.autograd.backward(value.loss)
        optimizer.step()
    return network


class ConditionalScoreMlp(nn.Module):
    """A small conditional network of the form f(x, sigma) / sigma for the mixture.

    Args:
        sigmas: Noise levels [L].
    """

    sigmas: Tensor

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__()
        self.register_buffer("sigmas", sigmas.clone())
        widths = (3, 128, 128, 128)
        layers: list[nn.Module] = []
        for inside, out in pairwise(widths):
            layers += [nn.Linear(inside, out), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(128, 2))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Score [N, 2] at x [N, 2] and level int64 [N]."""
        sigma = self.sigmas[level][:, None]
        # 26 is the mixture's second moment per coordinate, so the input has unit size at every level.
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
    state = TrainState(network, optimizer, Ema(network, decay=ema_decay))
    for _ in range(num_steps):
        batch = Batch(
            x=TWO_MODES.sample(batch_size, generator=generator),
            level=torch.randint(0, len(sigmas), (batch_size,), generator=generator),
            z=torch.randn(batch_size, 2, generator=generator),
        )
        train_step(network, batch, state=state, loss=DenoisingScoreMatching(), sigmas=sigmas, options=StepOptions())
    return network, state.ema
