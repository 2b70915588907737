"""Restored images from a trained network, see `ncsn.core.samplers.restoration`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn.config.schema import SamplingConfig
from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.likelihood import sigma_data_of
from ncsn.core.samplers.base import Sampler
from ncsn.core.samplers.measurements import Operator
from ncsn.core.samplers.multistep import DpmSolver
from ncsn.core.samplers.ode import KarrasHeun, ProbabilityFlow
from ncsn.core.samplers.restoration import (
    Covariance,
    Diverged,
    Guidance,
    Measured,
    Residual,
    gaussian_variance,
    restored,
)
from ncsn.errors import UserError
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.generate import finished, image_labels, image_shape, inference
from ncsn.model.guidance import score_function
from ncsn.model.restoration.tasks import Restoration

STEP_OF_RESIDUAL = 0.5  # zeta


def restoring(trained: TrainedNetwork, sampling: SamplingConfig, settings: Restoration) -> SamplingConfig:
    """The sampling section with the sampler of a restoration: on its own grid, or on levels that the network knows."""
    anywhere = hasattr(trained.network, "score_at")
    steps: dict[str, Any] = {"num_steps" if anywhere else "num_levels": settings.steps}
    sampler: Sampler
    if settings.method == "dps":
        sampler = DpmSolver(**steps, order=1, eta=1.0)
    elif settings.solver == "2m":
        sampler = DpmSolver(**steps)
    elif anywhere:
        sampler = KarrasHeun(**steps)
    else:
        sampler = ProbabilityFlow(**steps, spacing="karras")
    return sampling.model_copy(update={"sampler": build.sampler_section(sampler)})


def restore(
    trained: TrainedNetwork,
    y: Tensor,
    operator: Operator,
    settings: Restoration,
    *,
    sampling: SamplingConfig,
    labels: Tensor | None = None,
    first: int = 0,
    device: str | torch.device = "cpu",
) -> NDArray[np.uint8]:
    """Images that fit a measurement, as one batch; the same in any batch.

    Args:
        y: The measurement [N, C, h, w], see `ncsn.model.restoration.tasks`.
        operator: What it measures, on the CPU.
        sampling: That of `restoring`, or with another sampler of an ODE.
        labels: Class of each image, int64 [N], for a network of classes; None for those of `generate`.
        first: Index of the first image: image i draws the noise that `generate` gives image i.

    Returns:
        uint8 [N, H, W, C].
    """
    config, sampler = trained.config, build.sampler(sampling.sampler)
    if not sampler.descends:
        reason = "restoring images needs a sampler from the largest to the smallest sigma, without a corrector"
        raise UserError("sampling.sampler.kind", reason, hint="use karras_heun or dpm_solver", value=sampler.kind)
    noise = KeyedNoise(sampling.seed, first=first, count=len(y), shape=image_shape(config), device=device)
    if labels is None:
        labels = image_labels(trained, sampling, first=first, count=len(y))
    sigmas = build.sampled_sigmas(config, sampling).to(device)
    sigma_1 = build.sampled_levels(config, sampling).sigma_1
    with inference(sampling, device, derivatives=True):
        try:
            x = restored(
                score_function(trained, sampling, sampler, labels=labels),
                Measured(operator, y.to(device), settings.assumed_noise),
                _guidance(trained, settings, sampler.visited(sigmas)),
                sampler=sampler,
                x=sampler.start(trained.moments, sigma_1=sigma_1, noise=noise),
                sigmas=sigmas,
                noise=noise,
                scale=sigma_data_of(trained.moments, center=0.0),
            )
        except Diverged as error:
            hint = f"raise {settings.key('steps')} or {settings.key('sigma_y')}"
            raise UserError(settings.key("method"), str(error), hint=hint, value=settings.method) from None
    return finished(x, sampling, config, what=f"images {first} to {first + len(y) - 1}")


def _guidance(trained: TrainedNetwork, settings: Restoration, sigmas: list[float]) -> Guidance:
    if settings.method == "dps":
        return Residual(STEP_OF_RESIDUAL, sigmas)
    known = getattr(trained.network, "sigma_data", None)
    return Covariance(gaussian_variance(known or sigma_data_of(trained.moments)))
