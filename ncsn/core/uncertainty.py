"""A weight of the loss that is learned with the network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Uncertainty(nn.Module):
    """u(sigma), the logarithm of the weighted loss per pixel that is expected there (Karras et al. 2024).

    A linear layer on fixed random Fourier features of ln(sigma) / 4. It starts at 0, and training learns it with the
    network: the least of l e^-u + u over u is at u = ln l. So no sigma dominates the gradient because its loss is
    larger.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, *, features: int = 128, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features, generator=generator))
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, sigma: Tensor) -> Tensor:
        """The logarithm at each sigma [B], [B]."""
        angles = (2 * sigma.float()).log()[:, None] / 4 * self.frequencies + self.phases
        u: Tensor = (2 / len(self.weight)) ** 0.5 * angles.cos() @ self.weight
        return u
