"""The losses of score matching (Song & Ermon 2019, equations 2, 3, 5 and 6): frozen settings, called on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ncsn.core.keyed_random import COMMON_SEED, keyed_normal

# A score network, called as `ncsn.core.networks.base` says.
ScoreFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Batch:
    """Images with all their random draws."""

    x: Tensor  # clean images [B, C, H, W] in the network's space
    sigma: Tensor  # standard deviation of the noise of each, [B]
    z: Tensor  # standard normal, x's shape
    level: Tensor | None = None  # number of each sigma among the levels, int64 [B], 0 = most noise; None for any sigma
    v: Tensor | None = None  # directions, standard normal, x's shape, for sliced score matching
    # What the network is told beside the noise, by name as `ncsn.core.networks.base` says; each [B, ...].
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    lower: Tensor | None = None  # the smaller noise of each pair, [B], for consistency; 0 = the image itself

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the network sees beside the noisy images."""
        noise = {"sigma": self.sigma} if self.level is None else {"level": self.level}
        return {**noise, **self.conditions}

    def __getitem__(self, part: slice) -> Batch:
        own = {name: values[part] for name, values in vars(self).items() if isinstance(values, Tensor)}
        return replace(self, **own, conditions={name: values[part] for name, values in self.conditions.items()})


@dataclass(frozen=True)
class LossValue:
    """The loss of a batch, in float32 for any precision of the network (float64 if x is)."""

    loss: Tensor  # scalar with gradient: mean over the batch of the weighted loss summed over pixels
    per_image: Tensor  # [B] without gradient, normalized: a zero network reads 1.0, but less with a teacher


# The weight of |sigma s + z|^2 in a loss at each sigma [B], in its shape and type.
Weight = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PowerWeight:
    """sigma^(p - 2), so that lambda(sigma) of equation 6 is sigma^p."""

    anneal_power: float = 2.0  # p; the paper's lambda(sigma) = sigma^2 is p = 2

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma ** (self.anneal_power - 2.0)


@dataclass(frozen=True)
class EdmWeight:
    """1 + (sigma / sigma_data)^2, the weight of Karras et al. 2022.

    In their paper it is (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, of |D - x|^2 = sigma^2 |sigma s + z|^2. It
    gives the error of a preconditioned network F a weight of 1 at every sigma.
    """

    sigma_data: float

    def __call__(self, sigma: Tensor) -> Tensor:
        return 1 + (sigma / self.sigma_data).square()


@dataclass(frozen=True)
class DenoisingScoreMatching:
    """Denoising score matching at one noise level per image (equations 5 and 6).

    The loss of an image is w(sigma) sigma^2 / 2 |s(x + sigma z, sigma) + z / sigma|^2, computed as
    w(sigma) / 2 |sigma s + z|^2 so that no term grows as sigma falls. The norm sums over pixels. With an uncertainty
    u(sigma) that loss l of D pixels becomes l e^-u + u D / 2.
    """

    weight: Weight = PowerWeight()
    uncertainty: Callable[[Tensor], Tensor] | None = None  # such as `ncsn.core.uncertainty.Uncertainty`

    def __call__(self, network: ScoreFunction, batch: Batch) -> LossValue:
        sigma = batch.sigma.to(batch.x.dtype)
        batch = replace(batch, sigma=sigma)
        scale = per_pixel(sigma, batch.x)
        score = network(torch.addcmul(batch.x, batch.z, scale), **batch.inputs).to(batch.x.dtype)
        squared = torch.addcmul(batch.z, score, scale).square().flatten(1).sum(dim=1)  # |sigma s(x + sigma z) + z|^2
        weighted, size = squared * self.weight(sigma), batch.x[0].numel()
        if self.uncertainty is not None:
            u = self.uncertainty(sigma)
            weighted = weighted * torch.exp(-u) + u * size
        return LossValue(loss=0.5 * weighted.mean(), per_image=squared.detach() / size)


# A loss that a training step minimizes, as that here and those in `ncsn.core.sliced` and `ncsn.core.consistency`.
Loss = Callable[[ScoreFunction, Batch], LossValue]


def per_pixel(values: Tensor, x: Tensor) -> Tensor:
    """Values [B] in a shape that broadcasts over images x [B, ...]."""
    return values.view(-1, *[1] * (x.ndim - 1))


def losses_at(
    network: ScoreFunction,
    x: Tensor,
    *,
    first: int,
    sigmas: Tensor,
    levels: Sequence[int] | None,
    stream: int,
    labels: Tensor | None = None,
) -> Tensor:
    """Normalized denoising loss of each image at each sigma, float32 [S, B]; a zero network reads 1.

    A network that fits the distribution has the same loss on images that training does not use. One that repeats its
    training images has a lower loss on these: the gap. All random draws are functions of (image, noise level), so the
    losses of two networks, or of one at two times, are paired.

    Args:
        x: Clean images [B, C, H, W] in the network's space, numbers `first .. first + B` of their set.
        sigmas: Noise standard deviations to measure at [S].
        levels: Their numbers in the network's schedule; None for a network that takes any sigma.
        stream: Of the noise at the first sigma; each further one has the next.
        labels: Class of each image, int64 [B]; None for a network without classes.
    """
    loss, size = DenoisingScoreMatching(), x[0].numel()
    conditions, rows = {} if labels is None else {"labels": labels}, []
    for number, sigma in enumerate(sigmas.to(x.device)):
        z = keyed_normal(COMMON_SEED, stream=stream + number, first=first, count=len(x), size=size).view(x.shape)
        level = None if levels is None else torch.full((len(x),), levels[number], device=x.device)
        rows.append(loss(network, Batch(x, sigma.expand(len(x)), z.to(x), level, conditions=conditions)).per_image)
    return torch.stack(rows)
