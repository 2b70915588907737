"""The one entry of every score network: `network(x, level)` or `network(x, sigma=sigma)`, with what else it knows.

DistributedDataParallel and compilation see `forward` alone, so training goes through it at any noise level.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class ContinuousNetwork(nn.Module):
    """A score network for any noise level. A subclass has `score_at` with an argument for each of its conditions."""

    sigmas: Tensor  # the levels that samplers visit [L], descending
    conditions: frozenset[str] = frozenset()  # of the arguments `labels` and `augmentation`, those that it takes

    def forward(
        self,
        x: Tensor,
        level: Tensor | None = None,
        *,
        sigma: Tensor | None = None,
        labels: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """Score [B, C, H, W] of noisy images, in 1 / pixel units, by exactly one of level and sigma.

        Args:
            x: [B, C, H, W] noisy images, clean pixels in [0, 1].
            level: int64 [B] in 0..L-1, 0 = most noise.
            sigma: [B] positive noise standard deviations in units of pixels in [0, 1].
            labels: int64 [B], -1 = no class; None for no classes.
            augmentation: [B, 9], see `ncsn.core.augmentation`; None for nothing.
        """
        given = {"labels": labels, "augmentation": augmentation}
        conditions = {name: value for name, value in given.items() if value is not None}
        check_conditions(self, conditions, known=self.conditions)
        if (level is None) == (sigma is None):
            raise ValueError("a network takes exactly one of level and sigma")
        if level is not None:
            check_levels(level, batch=len(x), num_levels=len(self.sigmas))
            sigma = self.sigmas[level]
        assert sigma is not None
        if sigma.shape != (len(x),) or not sigma.is_floating_point():
            raise ValueError(
                f"sigma must be floats of shape [{len(x)}], got {sigma.dtype} of shape {list(sigma.shape)}"
            )
        return self.score_at(x, sigma, **conditions)

    def score_at(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Score [B, C, H, W] at sigma [B]."""
        raise NotImplementedError


def check_conditions(network: nn.Module, given: Iterable[str], *, known: Iterable[str] = ()) -> None:
    """Raise ValueError if conditions are given that the network does not take."""
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{type(network).__name__} does not take {' and '.join(unknown)}")


def check_levels(level: Tensor, *, batch: int, num_levels: int) -> None:
    """Raise ValueError unless `level` is int64 [batch] within 0, ..., num_levels - 1."""
    if level.shape != (batch,) or level.dtype != torch.int64:
        raise ValueError(f"level must be int64 of shape [{batch}], got {level.dtype} of shape {list(level.shape)}")
    # Reading the range would wait for a GPU, and would split a compiled network in two.
    if level.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if batch and not 0 <= int(level.min()) <= int(level.max()) < num_levels:
        raise ValueError(
            f"levels run from 0 (most noise) to {num_levels - 1}, got {int(level.min())} to {int(level.max())}"
        )
