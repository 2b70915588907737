"""Sliced score matching, for a network that is twice differentiable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ncsn.core.losses import Batch, LossValue, ScoreFunction, per_pixel


@dataclass(frozen=True)
class SlicedScoreMatching:
    """Sliced score matching with variance reduction (2019, section 2.1 and equation 3) on perturbed data.

    The loss of an image is sigma^p (1/2 |s|^2 + v . grad_x (v . s)) at x + sigma z, for a random v. It equals denoising
    score matching up to a constant in expectation, and is negative once the network has learned. The network must be
    twice differentiable. `per_image` is 1 + 2 sigma^2 l / D for the unweighted loss l, which has the expectation of
    denoising score matching's, so that the two trainings compare.
    """

    anneal_power: float = 2.0

    def __call__(self, network: ScoreFunction, batch: Batch) -> LossValue:
        assert batch.v is not None
        x, sigma = batch.x, batch.sigma.to(batch.x.dtype)
        noisy = torch.addcmul(x, batch.z, per_pixel(sigma, x)).requires_grad_()
        # Of the attention kernels only the plain one can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            score = network(noisy, **batch.inputs).to(x.dtype)
            (gradient,) = torch.autograd.grad((batch.v * score).sum(), noisy, create_graph=True)
            unweighted = 0.5 * score.square().flatten(1).sum(dim=1) + (batch.v * gradient).flatten(1).sum(dim=1)
        normalized = 1 + 2 * sigma.square() * unweighted.detach() / x[0].numel()
        return LossValue(loss=(sigma**self.anneal_power * unweighted).mean(), per_image=normalized)
