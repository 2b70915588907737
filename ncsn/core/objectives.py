"""What training can minimise, with one calling convention, as the samplers have theirs.

An objective is a frozen set of settings, called as `objective(network, x, level=..., sigmas=..., z=..., v=...)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ncsn.core.losses import dsm_loss, ssm_loss

if TYPE_CHECKING:
    from ncsn.core.losses import DsmLoss, ScoreFunction


class Objective(Protocol):
    """What every objective is."""

    def __call__(
        self, network: ScoreFunction, x: Tensor, *, level: Tensor, sigmas: Tensor, z: Tensor, v: Tensor | None = None
    ) -> DsmLoss:
        """Loss of a batch.

        Args:
            network: The score network.
            x: Clean images [B, C, H, W].
            level: Noise level of each image, int64 [B], 0 = most noise.
            sigmas: The noise levels [L], descending.
            z: Standard normal numbers of x's shape.
            v: Projections [P, B, C, H, W], standard normal, for the objective that needs them.
        """


@dataclass(frozen=True)
class DenoisingScoreMatching:
    """Equations 5 and 6, see `dsm_loss`."""

    anneal_power: float = 2.0
    antithetic: bool = False

    def __call__(
        self,
        network: ScoreFunction,
        x: Tensor,
        *,
        level: Tensor,
        sigmas: Tensor,
        z: Tensor,
        v: Tensor | None = None,  # noqa: ARG002 - the convention of all objectives
    ) -> DsmLoss:
        """Loss of a batch.

        Raises:
            ValueError: The objective is not for so many levels.
        """
        self.require_levels(len(sigmas))
        power, antithetic = self.anneal_power, self.antithetic
        return dsm_loss(network, x, level=level, sigmas=sigmas, z=z, anneal_power=power, antithetic=antithetic)

    def require_levels(self, count: int) -> None:
        """Refuse a number of levels that the objective is not for; this one takes any."""


@dataclass(frozen=True)
class SlicedScoreMatching:
    """Equation 3, see `ssm_loss`."""

    anneal_power: float = 2.0

    def __call__(
        self, network: ScoreFunction, x: Tensor, *, level: Tensor, sigmas: Tensor, z: Tensor, v: Tensor | None = None
    ) -> DsmLoss:
        """Loss of a batch.

        Raises:
            ValueError: There are no projections.
        """
        if v is None:
            raise ValueError("sliced score matching needs projections v [P, B, C, H, W], got none")
        # Of the attention kernels only the plain one can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            return ssm_loss(network, x, level=level, sigmas=sigmas, z=z, v=v, anneal_power=self.anneal_power)


@dataclass(frozen=True)
class SingleSigma(DenoisingScoreMatching):
    """The paper's baseline: equation 2 at one sigma and without weight.

    At the paper's sigma = 0.01 a zero network has a loss of D / 2 * 10^4, which is no sign of divergence.
    """

    anneal_power: float = 0.0

    def require_levels(self, count: int) -> None:
        """Refuse more than one level.

        Raises:
            ValueError: saying how many there are.
        """
        if count != 1:
            raise ValueError(f"the single-sigma baseline has one noise level, got {count}")
