"""Consistency tuning (Geng et al. 2024, Song et al. 2023): of a score network one that samples in a few evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ncsn.core.losses import Batch, LossValue, ScoreFunction, per_pixel
from ncsn.core.networks.layers import image_keys

K, B = 8.0, 1.0  # of n(t), see `PairSchedule`


@dataclass(frozen=True)
class Teacher:
    """The score of a trained network, with guidance s_0 + w (s_1 - s_0) (Ho & Salimans 2022).

    s_1 knows the class of an image and s_0 does not. Images without a class, and those outside low < sigma <= high,
    have s_1 alone.
    """

    network: nn.Module  # frozen, in eval mode
    weight: float = 1.0  # w; 1 = no guidance
    band: tuple[float, float] = (0.0, math.inf)  # low, high
    autocast_dtype: torch.dtype | None = None  # of the network's convolutions; None for that of the parameters

    @torch.no_grad()
    def __call__(self, noisy: Tensor, batch: Batch) -> Tensor:
        """Of the noisy images [B, C, H, W] of a batch, in their shape."""
        if self.weight == 1:
            return self._scores(noisy, batch.inputs)
        labels, (low, high) = batch.conditions["labels"], self.band
        guided = (labels >= 0) & (low < batch.sigma) & (batch.sigma <= high)
        passes = batch.inputs, {**batch.inputs, "labels": torch.full_like(labels, -1)}
        if noisy.device.type == "cpu":  # where twice the images gain nothing, and their maps leave its cache
            score, other = (self._scores(noisy, each) for each in passes)
        else:
            joined = {name: torch.cat([each[name] for each in passes]) for name in batch.inputs}
            score, other = self._scores(torch.cat([noisy, noisy]), joined).chunk(2)
        return score + per_pixel((self.weight - 1) * guided, noisy) * (score - other)

    def _scores(self, noisy: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        dtype = self.autocast_dtype
        with torch.autocast("cuda" if noisy.is_cuda else "cpu", dtype=dtype, enabled=dtype is not None):
            scores: Tensor = self.network(noisy, **inputs)
        return scores.to(noisy.dtype)


@dataclass(frozen=True)
class ConsistencyTuning:
    """Consistency tuning: what the network makes of an image at t, it is to make of it at r < t too.

    The loss is d / (t - r), d = |D(x_t, t) - D(x_r, r)| over all pixels, with x_t = x + t z of an image x and noise z.
    Without a teacher x_r = x + r z (easy consistency tuning, Geng et al. 2024); with one, x_r is where Euler's step on
    the probability flow of its score takes x_t (consistency distillation, Song et al. 2023). The second term has no
    gradient and the dropout masks of the first; at r = 0 it is x_r.
    """

    teacher: Teacher | None = None
    compiled: bool = False  # whether the network is; if not, a CPU computes no score at r = 0

    def __call__(self, network: ScoreFunction, batch: Batch) -> LossValue:
        assert batch.lower is not None
        x, lower = batch.x, batch.lower.to(batch.x.dtype)
        batch = replace(batch, sigma=batch.sigma.to(x.dtype))
        t, r = per_pixel(batch.sigma, x), per_pixel(lower, x)
        noisy = torch.addcmul(x, batch.z, t)
        slope = batch.z if self.teacher is None else -t * self.teacher(noisy, batch)
        with torch.no_grad():
            # At r = 0 the score counts nothing, but it must be finite. To leave it out, a GPU would wait for the number
            # of such images, and a compiler make code for each.
            inputs = {**batch.inputs, "sigma": torch.where(lower > 0, lower, batch.sigma)}
            near, inputs["dropout_keys"] = torch.addcmul(noisy, slope, r - t), image_keys(noisy)
            if x.device.type != "cpu" or self.compiled:
                target = network(near, **inputs).to(x.dtype)
            else:
                rows, target = lower.nonzero()[:, 0], torch.zeros_like(x)
                if len(rows):
                    given = {name: values[rows] for name, values in inputs.items()}
                    target[rows] = network(near[rows], **given).to(x.dtype)
            target = r.square() * target
        # In units of t - r, since the difference of two nearly equal images would be that of their rounding.
        score = network(noisy, **batch.inputs).to(x.dtype)
        difference = slope + (t.square() * score - target) / (t - r)
        squared = difference.square().flatten(1).sum(dim=1)
        # The slope of a root is infinite at 0, where this one has none.
        norm = squared.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
        return LossValue(loss=norm.mean(), per_image=squared.detach() / x[0].numel())


@dataclass(frozen=True)
class PairSchedule:
    """The two noise levels of consistency tuning, t and r = max(0, t (1 - n(t) / q^(stage + 1))) (Geng et al. 2024).

    n(t) = 1 + k sigmoid(-b t) with t in units of sigma_data / 0.5, as for pixels in [-1, 1] of deviation 0.5. The
    stages are equal parts of the training, a function of the image's place in the order like all draws.
    """

    q: float
    stages: int
    num_images: int  # of all stages
    sigma_data: float  # in the unit of t

    def lower(self, t: Tensor, *, first: int | None = None) -> Tensor:
        """The r of each t [B], of the images at places `first .. first + B`; None for places all over the training."""
        count = len(t)
        places = torch.arange(count) * self.num_images // count if first is None else torch.arange(first, first + count)
        stage = (places * self.stages // self.num_images).clamp_(max=self.stages - 1)
        n = 1 + K * torch.sigmoid(-B * t.double() * (0.5 / self.sigma_data))
        return (t * (1 - n / self.q ** (stage + 1.0))).clamp_(min=0).to(t.dtype)
