"""Samplers: frozen settings, called as `sampler(network, x=start, sigmas=..., noise=..., on_level=...) -> x`.

The state never leaves [B, C, H, W], an image depends only on its own start and noise, and nothing is clamped.
`denoise` means the same everywhere: the result is x + sigma_L^2 s(x) at the last level, or still carries its noise.
Annealed Langevin forgets its start. The others need an x distributed as the data plus noise of sigma_1.

Under guidance in a band of sigma the score jumps at the band's ends. A sampler that combines scores of several sigmas
takes them of one field (`ncsn.core.samplers.level_grid.field_of`), or loses its order.

A new sampler is a subclass of `Sampler`, a section in `ncsn.config.samplers.SamplerConfig` with the same fields, and an
entry in `_SAMPLERS` of `ncsn.model.build`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ncsn.core.images import DataMoments, moment_matched
from ncsn.core.keyed_random import InterpolatedNoise, KeyedNoise
from ncsn.core.losses import ScoreFunction
from ncsn.core.samplers.langevin import NoiseSource, OnLevel
from ncsn.core.samplers.level_grid import LevelGrid, Levels
from ncsn.errors import InvalidValue

_LONGEST_CHAIN = 100_000
_START_DRAW = 2**31  # far beyond the draws of any chain


@dataclass(frozen=True)
class Sampler(ABC):
    """A sampler; a subclass's fields are those of the config section of its `kind`."""

    kind: ClassVar[str]
    smallest_length: ClassVar[int] = 1
    uniform_start: ClassVar[bool] = False
    descends: ClassVar[bool] = False  # from the largest to the smallest sigma, without a corrector, as restoring needs

    @property
    def length(self) -> str | None:
        """The field that decides the NFE; None for none."""
        return None

    @abstractmethod
    def num_evaluations(self, num_levels: int) -> int:
        """NFE per image for a network of `num_levels` levels."""

    def visited(self, sigmas: Tensor) -> list[float]:
        """The sigma of each level that `on_level` is called for, given the network's levels [L]."""
        return self._levels(sigmas)[0]

    @abstractmethod
    def _levels(self, sigmas: Tensor) -> Levels: ...

    @torch.no_grad()
    def __call__(
        self, network: ScoreFunction, *, x: Tensor, sigmas: Tensor, noise: NoiseSource, on_level: OnLevel | None = None
    ) -> Tensor:
        """Run the chain of a network in eval mode, whose levels [L] descend.

        Args:
            x: Start [B, C, H, W]; it is not changed.
            noise: Number of a draw -> standard normal tensor of x's shape.
            on_level: Called with (k, x) when the k-th visited level is done; by ODE solvers, when it is reached.
        """
        return self._run(LevelGrid(network, *self._levels(sigmas)), x, noise=noise, on_level=on_level or _ignored)

    @abstractmethod
    def _run(self, grid: LevelGrid, x: Tensor, *, noise: NoiseSource, on_level: OnLevel) -> Tensor: ...

    def start(self, moments: DataMoments, *, sigma_1: float, noise: KeyedNoise | InterpolatedNoise) -> Tensor:
        """First state of the chain: uniform pixels, or a normal draw with the moments of the data plus noise."""
        if self.uniform_start:
            return noise.uniform(0)
        return moment_matched(moments, sigma=sigma_1, z=noise(_START_DRAW))

    def with_evaluations(self, nfe: int, *, num_levels: int) -> Self:
        """The sampler with a chain of exactly `nfe` evaluations; else an InvalidValue names the nearest."""
        near = {chain.num_evaluations(num_levels): chain for chain in self._near(nfe, num_levels)}
        if nfe in near:
            return near[nfe]
        if self.length is None:
            raise InvalidValue(f"cannot be chosen for the sampler {self.kind!r}")
        nearest = " or ".join(map(str, sorted(near)))
        raise InvalidValue(f"cannot be reached by sampling.sampler.{self.length}; use {nearest}")

    def nearest(self, nfe: int, *, num_levels: int) -> Self:
        """The sampler with the chain closest to `nfe` evaluations; itself if it has no `length`."""
        return min(self._near(nfe, num_levels), key=lambda chain: abs(chain.num_evaluations(num_levels) - nfe))

    def at_most(self, nfe: int, *, num_levels: int) -> Self | None:
        """The sampler with the longest chain of at most `nfe` evaluations; None if it cannot be that short."""
        if self.num_evaluations(num_levels) <= nfe:
            return self
        short = [chain for chain in self._near(nfe, num_levels) if chain.num_evaluations(num_levels) <= nfe]
        return short[-1] if short else None

    def _near(self, nfe: int, num_levels: int) -> list[Self]:
        """The chains, one or two, with the numbers of evaluations next to `nfe`."""
        if self.length is None or self.num_evaluations(num_levels) == nfe:
            return [self]
        longest = min(num_levels if self.length == "num_levels" else nfe, _LONGEST_CHAIN)
        lengths = range(self.smallest_length, longest + 1)
        index = bisect_left(lengths, nfe, key=lambda n: self._with(n).num_evaluations(num_levels))
        near = [lengths[i] for i in (index - 1, index) if 0 <= i < len(lengths)]
        return [self._with(length) for length in near or [self.smallest_length]]

    def _with(self, length: int) -> Self:
        assert self.length is not None
        changes: dict[str, Any] = {self.length: length}
        return replace(self, **changes)


def _ignored(_level: int, _x: Tensor) -> None: ...
