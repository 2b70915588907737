"""How much noise training adds to each image: a function of the image's place in the order, and bins for reports."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ncsn.core.keyed_random import PERMUTATION, Stream, keyed_uniform, random_words
from ncsn.core.losses import Batch

STRATA = 64  # consecutive draws that are spread evenly over the distribution
BINS = 10  # of the loss curves, at most
FEW_DRAWS = 1000  # from which a network learns a range of sigma


# The noise of a batch: its standard deviation for each image, float32 [B], and its number, int64 [B], 0 = most noise;
# None if it is not one of the levels.
NoiseDraw = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class LevelNoise:
    """Each level equally often (Song & Ermon 2019, equation 6)."""

    sigmas: Tensor  # [L], descending

    @property
    def bins(self) -> Tensor:
        """A typical sigma of each bin of the reports, float32 [S], descending: the middle of neighboring levels."""
        return self.spread(1)[:, 0]

    def spread(self, count: int) -> Tensor:
        """Values of sigma spread evenly over the probability of each bin, [S, count]; of few levels some are twice."""
        bins = min(BINS, len(self.sigmas))
        edges = (torch.arange(bins + 1) * len(self.sigmas) + bins - 1) // bins  # the first level of each bin
        place = (torch.arange(count) + 0.5) / count * edges.diff()[:, None]
        return self.sigmas[edges[:-1, None] + place.long()]

    def draw(self, seed: int, *, first: int, count: int) -> NoiseDraw:
        """The noise at places `first .. first + count` of the endless order of images, the same in any batch."""
        last = len(self.sigmas) - 1
        u = keyed_uniform(seed, stream=Stream.LEVEL, first=first, count=count, size=1)[:, 0]
        level = (u * (last + 1)).long().clamp_(max=last)
        return self.sigmas[level], level

    def bin_of(self, batch: Batch) -> Tensor:
        """The bin of each image, int64 [B]."""
        assert batch.level is not None
        return batch.level * min(BINS, len(self.sigmas)) // len(self.sigmas)


@dataclass(frozen=True)
class LognormalNoise:
    """ln sigma ~ N(mean, std^2), by the inverse of the distribution function (Karras et al. 2022, section 5).

    Each 64 consecutive places have one value from each 1/64 of the probability, in random order.
    """

    mean: float
    std: float

    def quantile(self, p: Tensor) -> Tensor:
        """Sigma at cumulative probabilities p in (0, 1), float64, p's shape."""
        return torch.exp(self.mean + self.std * torch.special.ndtri(p.double()))

    @property
    def bins(self) -> Tensor:
        """See `LevelNoise`: the medians of bins of equal probability."""
        return self.spread(1)[:, 0]

    def spread(self, count: int) -> Tensor:
        """See `LevelNoise`."""
        total = BINS * count
        p = (torch.arange(total, dtype=torch.float64) + 0.5) / total
        return self.quantile(p).flip(0).view(BINS, count).float()

    def draw(self, seed: int, *, first: int, count: int) -> NoiseDraw:
        """See `LevelNoise`; finite always, since the uniform numbers stay away from 0 and 1."""
        u = keyed_uniform(seed, stream=Stream.LEVEL, first=first, count=count, size=1)[:, 0].double()
        block, end = first // STRATA, -(-(first + count) // STRATA)
        words = random_words(seed, kind=PERMUTATION, stream=Stream.STRATUM, first=block, count=end - block, size=STRATA)
        stratum = words.argsort(dim=1, stable=True).flatten()[first - block * STRATA :][:count]
        return self.quantile((stratum + u) / STRATA).float(), None

    def bin_of(self, batch: Batch) -> Tensor:
        return BINS - 1 - torch.bucketize(batch.sigma, _edges(self, batch.sigma.device))

    def largest_seen(self, images: int) -> float:
        """The sigma above which a training of this many `images` draws about `FEW_DRAWS` times; 0 if it draws less."""
        share = torch.tensor(max(0.0, 1 - FEW_DRAWS / images), dtype=torch.float64)
        return float(self.quantile(share))


@cache
def _edges(noise: LognormalNoise, device: torch.device) -> Tensor:
    """Of the bins, ascending; a copy to a GPU at each step would wait for it."""
    return noise.quantile(torch.arange(1, BINS) / BINS).float().to(device)


TrainingNoise = LevelNoise | LognormalNoise
