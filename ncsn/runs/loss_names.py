"""Names of the loss curves of a training, one for each level or bin of sigma."""

from __future__ import annotations

from collections.abc import Sequence

from ncsn.config import Config

EDM_LOSS = "train/loss_edm"  # mean of the weight of Karras et al. times the normalized loss
_LEVEL, _SIGMA = "train/loss_level_", "train/loss_sigma_"


def loss_names(config: Config, sigmas: Sequence[float]) -> list[str]:
    """Names of the curves of the bins with these sigmas [S]."""
    if config.noise.training.kind == "levels":
        return level_names(len(sigmas))
    return [f"{_SIGMA}{text}" for text in sigma_texts(sigmas)]


def loss_unit(config: Config) -> str:
    """What a curve is of: a noise level, or a bin of sigma."""
    return "level" if config.noise.training.kind == "levels" else "bin"


def level_names(num_levels: int) -> list[str]:
    """Names of the curves of all levels; the numbers have the same width, so that the names sort."""
    width = len(str(num_levels - 1))
    return [f"{_LEVEL}{level:0{width}d}" for level in range(num_levels)]


def sigma_texts(sigmas: Sequence[float]) -> list[str]:
    """Each sigma with three digits, or as many as tell all apart."""
    for digits in range(3, 9):
        texts = [f"{sigma:.{digits}g}" for sigma in sigmas]
        if len(set(texts)) == len(texts):
            break
    return texts
