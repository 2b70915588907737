"""Figures 2 and 3 of Song & Ermon (2019) in two dimensions: why noise at many levels is needed.

The data are a mixture of two Gaussians whose score is known. A network that learns the score of the clean data is right
only where there is data, and Langevin dynamics with it, even with the exact score, cannot tell how many points belong
to each mode. Annealed Langevin dynamics over ten noise levels can.

    python examples/toy.py --out toy.png
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from small_images import arguments
from torch import Tensor, nn

from ncsn.core.ema import Ema, step_decay
from ncsn.core.losses import Batch, DenoisingScoreMatching
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.langevin import annealed_langevin, langevin_step
from ncsn.core.sliced import SlicedScoreMatching
from ncsn.core.training import StepOptions, TrainState, train_step

LEARNED_SIGMAS = geometric_sigmas(10.0, 0.1, 10)
LIMIT = 8.0  # the figures show [-8, 8]^2


@dataclass(frozen=True)
class GaussianMixture:
    """Isotropic Gaussians of standard deviation 1 in D dimensions, with noise of standard deviation sigma added."""

    means: Tensor  # [K, D]
    weights: Tensor  # [K], summing to 1

    def log_density(self, x: Tensor, *, sigma: float = 0.0) -> Tensor:
        """Up to a constant, at x [N, D]."""
        return torch.logsumexp(self._logits(x, sigma), dim=1)

    def score(self, x: Tensor, *, sigma: float = 0.0) -> Tensor:
        """Gradient of `log_density`, [N, D]."""
        posterior = torch.softmax(self._logits(x, sigma), dim=1)
        return (posterior @ self.means.to(x) - x) / (1 + sigma**2)

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return self.means[component] + torch.randn(count, self.means.shape[1], generator=generator)

    def _logits(self, x: Tensor, sigma: float) -> Tensor:
        distance = (x[:, None] - self.means.to(x)).square().sum(dim=2)
        return self.weights.to(x).log() - distance / (2 * (1 + sigma**2))


MIXTURE = GaussianMixture(means=torch.tensor([[-5.0, -5.0], [5.0, 5.0]]), weights=torch.tensor([0.2, 0.8]))


def share_of_heavy_mode(points: Tensor) -> float:
    """Share of points [N, 2] that are nearest to (5, 5); 0.8 is right."""
    return float((torch.cdist(points, MIXTURE.means).argmin(dim=1) == 1).float().mean())


def fit_clean_score(*, num_steps: int, seed: int = 0) -> nn.Module:
    """Figure 2: sliced score matching on the clean mixture."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(2, 128), nn.Softplus(), nn.Linear(128, 128), nn.Softplus(), nn.Linear(128, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    loss = SlicedScoreMatching(anneal_power=0.0)
    no_noise = torch.zeros(128), torch.zeros(128, 2)
    for _ in range(num_steps):
        x = MIXTURE.sample(128, generator=generator)
        v = torch.randn(128, 2, generator=generator)
        optimizer.zero_grad()
        loss(lambda x, **_: network(x), Batch(x, *no_noise, v=v)).loss.backward()
        optimizer.step()
    return network


class ConditionalScore(nn.Module):
    """A small network s(x, sigma) = f(x, sigma) / sigma for the noise levels [L]."""

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__()
        self.sigmas = sigmas
        self.layers = nn.Sequential(
            nn.Linear(3, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 2),
        )

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Score [N, 2] at x [N, 2] and level int64 [N]."""
        sigma = self.sigmas[level][:, None]
        # 26 is the second moment of the mixture per coordinate, so the input has unit size at every level.
        return self.layers(torch.cat((x / (sigma.square() + 26).sqrt(), sigma.log()), dim=1)) / sigma


def fit_noisy_scores(*, num_steps: int, batch_size: int = 512, ema_decay: float = 0.99, seed: int = 0) -> nn.Module:
    """Denoising score matching over all levels; the EMA of the weights."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = ConditionalScore(LEARNED_SIGMAS)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    state = TrainState(network, optimizer, Ema(network, step_decay(ema_decay)))
    for _ in range(num_steps):
        x = MIXTURE.sample(batch_size, generator=generator)
        level = torch.randint(0, len(LEARNED_SIGMAS), (batch_size,), generator=generator)
        z = torch.randn(batch_size, 2, generator=generator)
        batch = Batch(x, LEARNED_SIGMAS[level], z, level)
        train_step(network, batch, state=state, loss=DenoisingScoreMatching(), options=StepOptions())
    state.ema.copy_to(network)
    return network


def uniform_start(count: int, generator: torch.Generator) -> Tensor:
    return LIMIT * (2 * torch.rand(count, 2, generator=generator) - 1)


@torch.no_grad()
def plain_langevin(score: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator) -> Tensor:
    """Figure 3b: a thousand steps with the paper's epsilon of 0.1, whose Algorithm 1 takes steps of epsilon / 2."""
    for _ in range(1000):
        x = langevin_step(x, score=score(x), step_size=0.05, z=torch.randn(x.shape, generator=generator))
    return x


def annealed(
    score: Callable[[Tensor, Tensor], Tensor], x: Tensor, generator: torch.Generator, *, sigmas: Tensor, epsilon: float
) -> Tensor:
    """Figure 3c: a hundred steps at each level, largest first."""
    return annealed_langevin(
        score,
        x=x,
        sigmas=sigmas,
        epsilon=epsilon / 2,
        steps_per_level=100,
        noise=lambda _: torch.randn(x.shape, generator=generator),
        denoise=False,
    )


def sample_all(clean: nn.Module, noisy: nn.Module, *, count: int = 1280, seed: int = 0) -> dict[str, Tensor]:
    """The points of each sampler, [N, 2]."""
    generator = torch.Generator().manual_seed(seed)
    # In the paper's experiment sigma is the whole standard deviation of a mode, so the last level is the data itself.
    # The levels are those of its appendix; with the 10 to 0.1 of its text the chain diverges.
    whole = geometric_sigmas(20.0, 1.0, 10)

    def exact(x: Tensor, level: Tensor) -> Tensor:
        return MIXTURE.score(x, sigma=float((whole[level].square() - 1).clamp(min=0).sqrt()[0]))

    def start() -> Tensor:
        return uniform_start(count, generator)

    return {
        "exact sampling": MIXTURE.sample(count, generator=generator),
        "plain Langevin, exact score": plain_langevin(MIXTURE.score, start(), generator),
        "annealed Langevin, exact scores": annealed(exact, start(), generator, sigmas=whole, epsilon=0.1),
        "plain Langevin, learned score": plain_langevin(clean, start(), generator),
        "annealed Langevin, learned scores": annealed(noisy, start(), generator, sigmas=LEARNED_SIGMAS, epsilon=1e-3),
    }


@torch.no_grad()
def relative_error(network: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Squared error of a learned clean score at x [N, 2], as a share of the exact score's square."""
    exact = MIXTURE.score(x)
    return float((network(x) - exact).square().sum() / exact.square().sum())


def main() -> None:
    given = arguments(__doc__, out="toy.png")
    clean = fit_clean_score(num_steps=10_000 if given.full else 3000)
    noisy = fit_noisy_scores(num_steps=6000 if given.full else 1500)
    points = sample_all(clean, noisy)
    for name, x in points.items():
        print(f"{name:34} {share_of_heavy_mode(x):.2f} of the points at (5, 5); 0.80 is right")
    near = MIXTURE.sample(4000, generator=torch.Generator().manual_seed(1))
    between = 2 * torch.rand(4000, 2, generator=torch.Generator().manual_seed(1)) + torch.tensor([-4.0, 3.0])
    errors = [relative_error(clean, x) for x in (near, between)]
    print(f"error of the clean score: {errors[0]:.3f} near the modes, {errors[1]:.3f} between them")
    # The exact and the learned score as arrows, and the points of each sampler with the share of each mode.
    axis = torch.linspace(-LIMIT, LIMIT, 17)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        fields = {"exact score": MIXTURE.score(grid), "score learned from clean data": clean(grid)}
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    cells = list(figure.subplots(2, 4, sharex=True, sharey=True).T.flat)
    for cell, (title, field) in zip(cells, fields.items(), strict=False):
        cell.quiver(*grid.T.numpy(), *field.T.numpy(), angles="xy", scale_units="xy", scale=9, width=0.004)
        cell.set_title(title)
    cells[2].set_axis_off()
    for cell, (title, x) in zip(cells[3:], points.items(), strict=True):
        share = share_of_heavy_mode(x)
        cell.plot(*x.T.numpy(), ".", markersize=2, alpha=0.6)
        cell.set_title(f"{title}\n{1 - share:.2f} and {share:.2f} of the points")
    for cell in cells:
        cell.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")
    figure.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
