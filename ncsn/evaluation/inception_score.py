"""The formula of the Inception score, for any classifier (Salimans et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ncsn.errors import UserError


@dataclass(frozen=True)
class Score:
    """Mean and population standard deviation of the score over the splits, each in [1, K]."""

    mean: float
    std: float


def inception_score(log_probabilities: npt.ArrayLike, *, num_splits: int = 10) -> Score:
    """The exponential of the mean KL divergence between p(y|x) and p(y), the mean of p(y|x) within a split.

    The result is an *Inception score* only for the logits of the 2015 Inception graph without its last bias; with any
    other classifier it is that classifier's score.

    Args:
        log_probabilities: [N, K] log p(y|x), each row summing to 1 after exp; -inf for a probability of 0 is fine.
        num_splits: contiguous splits of the N rows, equal to within one row; order matters.

    Raises:
        ValueError: for a wrong shape, NaN, rows that are not distributions, or fewer rows than splits.
    """
    log_p = np.asarray(log_probabilities, dtype=np.float64)
    _check(log_p, num_splits)
    count = len(log_p)
    # Split by split, so that of a memory map no more than a split is in memory.
    splits = [log_p[split * count // num_splits : (split + 1) * count // num_splits] for split in range(num_splits)]
    if missing := sum(int(np.isnan(rows).any(axis=1).sum()) for rows in splits):
        raise ValueError(f"{missing} of {count} rows of log probabilities hold NaN")
    scores = [_score_of_split(rows) for rows in splits]
    return Score(mean=float(np.mean(scores)), std=float(np.std(scores)))


def _score_of_split(log_p: npt.NDArray[np.float64]) -> float:
    p = np.exp(log_p)
    worst = float(np.abs(p.sum(axis=1) - 1).max())
    if not worst <= 1e-3:
        raise ValueError(f"rows must be log probabilities, but one sums to 1 only within {worst:.3g}: use log_softmax")
    marginal = p.mean(axis=0)
    # E KL(p(y|x) || p(y)) = H(y) - H(y|x); each entropy has 0 log 0 = 0.
    conditional = -np.sum(p * np.where(p > 0, log_p, 0.0), axis=1).mean()
    entropy = -np.sum(marginal * np.log(np.where(marginal > 0, marginal, 1.0)))
    return float(np.clip(np.exp(entropy - conditional), 1.0, log_p.shape[1]))


def _check(log_p: npt.NDArray[np.float64], num_splits: int) -> None:
    if log_p.ndim != 2 or log_p.shape[1] < 1:
        raise ValueError(f"log probabilities must be [images, classes], got shape {list(log_p.shape)}")
    if num_splits < 1:
        raise ValueError(f"num_splits = {num_splits}; use 1 or more")
    if len(log_p) < num_splits:
        raise UserError(
            "sampling.num_images",
            f"does not fill {num_splits} splits",
            hint=f"generate at least {num_splits} images or lower evaluation.num_splits",
            value=len(log_p),
        )
