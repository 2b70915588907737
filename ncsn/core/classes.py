"""The classes of images: which labels training hides, and which class each generated image has.

A label is the index of a class, or -1 for none. All draws are functions of the image's place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ncsn.core.keyed_random import Stream, keyed_uniform

NO_CLASS = -1


def drop_labels(labels: Tensor, *, probability: float, seed: int, first: int) -> Tensor:
    """Labels int64 [B] of places `first ..` of the training order, each replaced by -1 with `probability`.

    So one network learns the distribution of each class and that of all images (Ho & Salimans 2022).
    """
    if probability == 0:
        return labels
    u = keyed_uniform(seed, stream=Stream.LABEL, first=first, count=len(labels), size=1)[:, 0]
    return torch.where(u < probability, NO_CLASS, labels)


def balanced_labels(num_classes: int, *, first: int, count: int) -> Tensor:
    """Labels of images `first .. first + count`, int64: the classes in turn, so that their numbers differ by 1."""
    return torch.arange(first, first + count) % num_classes


def drawn_labels(class_counts: Sequence[int], *, seed: int, first: int, count: int) -> Tensor:
    """Labels of images `first .. first + count`, int64, drawn in proportion to how often training saw each class."""
    ends = torch.tensor(class_counts, dtype=torch.float64).cumsum(0)
    u = keyed_uniform(seed, stream=Stream.LABEL_CHOICE, first=first, count=count, size=1)[:, 0]
    return torch.bucketize(u.double() * ends[-1], ends, right=True).clamp_(max=len(class_counts) - 1)
