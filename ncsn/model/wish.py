"""What a caller may change of a trained network's sampling, and the images of a wish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncsn.config.rules import checked
from ncsn.config.schema import SamplingConfig
from ncsn.core.samplers.settings import Sampler
from ncsn.errors import UserError
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.classes import require_label
from ncsn.model.generate import generate


@dataclass(frozen=True)
class Wish:
    """Changes of `sampling` in the network's config; None leaves what stands there."""

    label: int | str | None = None  # of `sampling.label`
    guidance: float | None = None  # its weight; where none is configured, away from the images of all classes
    sampler: Sampler | Mapping[str, Any] | str | None = None  # or its settings, or its kind, with default settings
    seed: int | None = None

    def sampling(self, trained: TrainedNetwork) -> SamplingConfig:
        """The settings for a network; `UserError`, with keys as here, if it cannot follow them."""
        config = trained.config
        own, changes = config.sampling, dict[str, Any]()
        if self.label is not None:
            changes["label"] = str(self.label)
        if self.seed is not None:
            changes["seed"] = self.seed
        if self.sampler is not None and self.sampler != own.sampler.kind:
            changes["sampler"] = {"kind": self.sampler} if isinstance(self.sampler, str) else self.sampler
        if self.guidance is not None and own.guidance is not None:
            changes["guidance"] = {**dict(own.guidance), "weight": self.guidance}
        elif self.guidance not in (None, 1):
            changes["guidance"] = {"kind": "classifier_free", "weight": self.guidance}
        try:
            found = checked({**dict(config), "sampling": {**dict(own), **changes}}).sampling
            require_label(found.label, trained.classes)
        except UserError as error:
            raise error.reworded({"sampling.": "", "noise.num_levels = ": "the model's "}) from None
        return found


def images(trained: TrainedNetwork, count: int, wish: Wish) -> NDArray[Any]:
    """The first `count` images of a seed, [count, H, W, C] as stored; see `Wish.sampling` and `generate`."""
    sampling, device = wish.sampling(trained), next(trained.network.parameters()).device
    size = sampling.batch_size
    parts = [
        generate(trained, sampling=sampling, first=first, count=min(size, count - first), device=device)
        for first in range(0, count, size)
    ]
    return np.concatenate(parts)
