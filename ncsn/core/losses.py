"""Score matching losses (Song & Ermon 2019, equations 2, 3, 5 and 6): frozen settings, called on a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# A score network: (x [B, C, H, W], level int64 [B]) -> score of x's shape.
ScoreFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Images with all their random draws."""

    x: Tensor  # clean images [B, C, H, W] in the network's space
    level: Tensor  # noise level of each, int64 [B], 0 = most noise
    z: Tensor  # standard normal, x's shape
    v: Tensor | None = None  # projections [P, B, C, H, W], standard normal, for sliced score matching

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.x[part], self.level[part], self.z[part], None if self.v is None else self.v[:, part])

    def to(self, device: torch.device, *, memory_format: torch.memory_format) -> Batch:
        """The batch on `device`, images in this memory format. A copy to a GPU overlaps with computation."""

        def moved(part: Tensor, order: torch.memory_format) -> Tensor:
            # A copy is asynchronous only from pinned memory.
            source = part.pin_memory() if device.type == "cuda" else part
            return source.to(device, non_blocking=True, memory_format=order)

        return Batch(
            x=moved(self.x, memory_format),
            level=moved(self.level, torch.preserve_format),
            z=moved(self.z, memory_format),
            v=None if self.v is None else moved(self.v, torch.preserve_format),
        )


@dataclass(frozen=True)
class LossValue:
    """The loss of a batch, in float32 for any precision of the network (float64 if x is)."""

    loss: Tensor  # scalar with gradient: mean over the batch of the weighted loss summed over pixels
    per_image: Tensor  # [B] without gradient, normalized so that a zero network reads 1.0 in expectation


class Loss(Protocol):
    """A training loss."""

    @property
    def num_projections(self) -> int:
        """Random directions per image that it needs, `Batch.v`."""

    def __call__(self, network: ScoreFunction, batch: Batch, sigmas: Tensor) -> LossValue:
        """Loss of a batch at the noise levels `sigmas` [L], descending."""


@dataclass(frozen=True)
class DenoisingScoreMatching:
    """Denoising score matching at one noise level per image (equations 5 and 6).

    The loss of an image is sigma^p / 2 |s(x + sigma z, level) + z / sigma|^2, computed as
    sigma^(p - 2) / 2 |sigma s + z|^2 so that no term grows as sigma falls. The norm sums over pixels.
    """

    anneal_power: float = 2.0  # p; the paper's lambda(sigma) = sigma^2 is p = 2
    # Averages the loss over z and -z, at twice the cost. The term linear in z, whose variance grows as 1 / sigma^2
    # before weighting, nearly cancels.
    antithetic: bool = False

    num_projections: ClassVar[int] = 0

    def __call__(self, network: ScoreFunction, batch: Batch, sigmas: Tensor) -> LossValue:
        """See `Loss`."""
        x, level, z = batch.x, batch.level, batch.z
        sigma = sigmas.to(x.dtype)[level]
        if self.antithetic:
            both = _squared_residual(network, _twice(x), level=_twice(level), sigma=_twice(sigma), z=torch.cat((z, -z)))
            squared = both.view(2, -1).mean(dim=0)
        else:
            squared = _squared_residual(network, x, level=level, sigma=sigma, z=z)
        weighted = squared if self.anneal_power == 2.0 else squared * sigma ** (self.anneal_power - 2.0)
        return LossValue(loss=0.5 * weighted.mean(), per_image=squared.detach() / x[0].numel())


@dataclass(frozen=True)
class SingleSigma(DenoisingScoreMatching):
    """The paper's baseline: equation 2 at one sigma and without weight.

    At the paper's sigma = 0.01 a zero network has a loss of D / 2 * 10^4, which is no sign of divergence.
    """

    anneal_power: float = 0.0

    def __call__(self, network: ScoreFunction, batch: Batch, sigmas: Tensor) -> LossValue:
        """See `Loss`.

        Raises:
            ValueError: There is more than one level.
        """
        # One level in the schedule, so checkpoints, reports and samplers work unchanged; the 2019 network with one
        # level is unconditional.
        if len(sigmas) != 1:
            raise ValueError(f"the single-sigma baseline has one noise level, got {len(sigmas)}")
        return super().__call__(network, batch, sigmas)


@dataclass(frozen=True)
class SlicedScoreMatching:
    """Sliced score matching with variance reduction (2019, section 2.1 and equation 3) on perturbed data.

    The loss of an image is sigma^p (1/2 |s|^2 + v . grad_x (v . s)) at x + sigma z, averaged over the projections. It
    equals denoising score matching up to a constant in expectation, and is negative once the network has learned. The
    network must be twice differentiable. `per_image` is 1 + 2 sigma^2 l / D for the unweighted loss l, which has the
    expectation of denoising score matching's, so that the two trainings compare.
    """

    anneal_power: float = 2.0
    num_projections: int = 1

    def __call__(self, network: ScoreFunction, batch: Batch, sigmas: Tensor) -> LossValue:
        """See `Loss`.

        Raises:
            ValueError: There are no projections.
        """
        if batch.v is None:
            raise ValueError("sliced score matching needs projections v [P, B, C, H, W], got none")
        x, level = batch.x, batch.level
        sigma = sigmas.to(x.dtype)[level]
        noisy = torch.addcmul(x, batch.z, _per_pixel(sigma, x)).requires_grad_()
        # Of the attention kernels only the plain one can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            score = network(noisy, level).to(x.dtype)
            slopes = []
            for projection in batch.v:
                (gradient,) = torch.autograd.grad((projection * score).sum(), noisy, create_graph=True)
                slopes.append((projection * gradient).flatten(1).sum(dim=1))
            unweighted = 0.5 * score.square().flatten(1).sum(dim=1) + torch.stack(slopes).mean(dim=0)
        normalized = 1 + 2 * sigma.square() * unweighted.detach() / x[0].numel()
        return LossValue(loss=(sigma**self.anneal_power * unweighted).mean(), per_image=normalized)


def level_sums(per_image: Tensor, *, level: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """Sums and counts, each float64 [L], of values [B] at each level; add them up over batches and workers."""
    member = level[:, None] == torch.arange(num_levels, device=level.device)
    values = torch.where(member, per_image.detach().to(torch.float64)[:, None], 0.0)
    return values.sum(dim=0), member.to(torch.float64).sum(dim=0)


def _per_pixel(values: Tensor, x: Tensor) -> Tensor:
    """Values [B] in a shape that broadcasts over images x [B, ...]."""
    return values.view(-1, *[1] * (x.ndim - 1))


def _twice(values: Tensor) -> Tensor:
    return torch.cat((values, values))


def _squared_residual(network: ScoreFunction, x: Tensor, *, level: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
    """|sigma s(x + sigma z) + z|^2 of each image, [B]."""
    scale = _per_pixel(sigma, x)
    score = network(torch.addcmul(x, z, scale), level).to(x.dtype)
    return torch.addcmul(z, score, scale).square().flatten(1).sum(dim=1)
