"""The one entry of score networks, `network(x, level)` or `network(x, sigma=sigma)`, and what most of them share.

DistributedDataParallel and compilation see `forward` alone, so training goes through it at any noise level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ncsn.core.networks.layers import KeyedDropout, image_keys

NUM_LABELS = 9  # of an augmentation, see `ncsn.core.augmentation.augmentation_labels`


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


def num_groups(width: int) -> int:
    """Groups of a group norm: at most 32, of at least four channels, that divide `width`."""
    return math.gcd(width, max(1, min(32, width // 4)))


def attend(query_key_value: Tensor, *, num_heads: int) -> Tensor:
    """Attention over all pixels of maps [B, 3 C, H, W] in heads of C / num_heads channels, [B, C, H, W]."""
    batch, width, height, columns = query_key_value.shape
    heads = query_key_value.reshape(batch, 3, num_heads, -1, height * columns).transpose(3, 4)
    # A GPU's fused kernels need contiguous heads; a CPU's kernel is slower with them on small maps.
    query, key, value = (heads.contiguous() if heads.is_cuda else heads).unbind(1)
    mixed = functional.scaled_dot_product_attention(query, key, value)
    return mixed.transpose(2, 3).reshape(batch, width // 3, height, columns)


def misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The tensors that are missing, not wanted or of another shape, with the names of some; empty if there is none."""
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "not in this network": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(wanted[name].shape)}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name].shape != wanted[name].shape
        ],
    }
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in problems.items()
        if names
    )


class ConditionTerms(nn.Module):
    """What class and augmentation add to the features of the noise level, for the conditions that a network takes.

    Of K classes, class k adds W e_k sqrt(K) + b, no class b alone. Augmentation labels a add V a, so none add nothing.
    """

    def __init__(self, features: int, *, num_classes: int | None, augmentation: bool) -> None:
        super().__init__()
        self.map_label = None if num_classes is None else nn.Linear(num_classes, features)
        self.map_augment = nn.Linear(NUM_LABELS, features, bias=False) if augmentation else None
        for layer in (self.map_label, self.map_augment):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
        if self.map_label is not None:
            nn.init.zeros_(self.map_label.bias)
        parts = {"labels": self.map_label, "augmentation": self.map_augment}
        self.taken = frozenset(name for name, part in parts.items() if part is not None)  # names of the conditions

    def forward(self, h: Tensor, labels: Tensor | None = None, augmentation: Tensor | None = None) -> Tensor:
        """Features [B, features], labels int64 [B] and augmentation [B, 9] to features. None is no class, or zeros."""
        # Without labels the terms are computed too: each parameter must have a gradient where workers exchange them.
        if self.map_label is not None:
            classes = torch.arange(self.map_label.in_features, device=h.device)
            given = torch.full_like(h[:, 0], -1) if labels is None else labels
            one_hot = (given[:, None] == classes).to(h.dtype)
            h = h + self.map_label(one_hot * math.sqrt(len(classes)))
        if self.map_augment is not None:
            given = h.new_zeros(len(h), NUM_LABELS) if augmentation is None else augmentation.to(h.dtype)
            h = h + self.map_augment(given)
        return h


class PreconditionedNetwork(nn.Module):
    """Score network s(x, sigma) = (D(x; sigma) - x) / sigma^2 with the denoiser D of Karras et al. 2022, eq. 7.

    It takes any noise level. The paper's formulas hold for pixels in [-1, 1], so here x' = 2x - 1 and sigma' = 2 sigma
    stand in for x and sigma. Where the network F of a subclass, `_raw`, predicts zero, the score is that of a Gaussian
    around mid-gray with standard deviation `sigma_data` per pixel.
    """

    sigmas: Tensor  # the levels that samplers visit [L], descending
    conditions: frozenset[str] = frozenset()  # of the arguments `labels` and `augmentation`, those that it takes
    full_precision: ClassVar[tuple[str, ...]] = ()  # names, or their beginnings, of layers that autocast never narrows
    condition_reader: ClassVar[str]  # name of the linear layer that takes the features with the terms of conditions
    image_layers: tuple[str, str]  # names of the first and the last convolution

    def __init__(self, *, sigmas: Tensor, sigma_data: float, dropout: float) -> None:
        super().__init__()
        self.sigma_data, self.dropout = sigma_data, dropout
        self.register_buffer("sigmas", sigmas.detach().clone().float())

    def forward(
        self,
        x: Tensor,
        level: Tensor | None = None,
        *,
        sigma: Tensor | None = None,
        labels: Tensor | None = None,
        augmentation: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Score [B, C, H, W] of noisy images, in 1 / pixel units, by exactly one of level and sigma.

        Args:
            x: [B, C, H, W] noisy images, clean pixels in [0, 1].
            level: int64 [B] in 0..L-1, 0 = most noise.
            sigma: [B] positive noise standard deviations in units of pixels in [0, 1].
            labels: int64 [B], -1 = no class; None for no classes.
            augmentation: [B, 9], see `ncsn.core.augmentation`; None for nothing.
            dropout_keys: int32 [B], `image_keys` of the images whose dropout masks it takes; None for those of x.
        """
        given = {"labels": labels, "augmentation": augmentation}
        conditions = {name: value for name, value in given.items() if value is not None}
        if unknown := sorted(conditions.keys() - self.conditions):
            raise ValueError(f"{type(self).__name__} does not take {' and '.join(unknown)}")
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
        if dropout_keys is not None:
            conditions["dropout_keys"] = dropout_keys
        return self.score_at(x, sigma, **conditions)

    def score_at(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        labels: Tensor | None = None,
        augmentation: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Score at any noise level, float32 also under autocast; see `forward`."""
        sigma2x = 2 * sigma
        variance = (sigma2x.square() + (2 * self.sigma_data) ** 2)[:, None, None, None]
        x2x = 2 * x - 1
        drops = self.training and self.dropout > 0
        keys = None if not drops else image_keys(x) if dropout_keys is None else dropout_keys
        raw = self._raw(x2x * variance.rsqrt(), sigma2x.log() / 4, keys, labels=labels, augmentation=augmentation)
        raw = raw.to(x.dtype)
        # D' - x' with c_skip - 1 in closed form: the difference of D and x cancels at small sigma.
        gain = (2 * self.sigma_data) * variance.rsqrt() / sigma2x[:, None, None, None]
        return 2 * (gain * raw - x2x / variance)

    def _raw(self, x: Tensor, c_noise: Tensor, keys: Tensor | None = None, **conditions: Tensor | None) -> Tensor:
        """The network F before preconditioning: of scaled images, ln(sigma') / 4 [B], keys for dropout, conditions."""
        raise NotImplementedError

    def _number_dropout_layers(self) -> None:
        """Give each layer its own masks; once all are there."""
        for number, layer in enumerate(each for each in self.modules() if isinstance(each, KeyedDropout)):
            layer.layer = number
