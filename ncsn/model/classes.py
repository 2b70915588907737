"""The classes that a network knows, and the class of each image that it generates.

A label is the index of a class, or -1 for none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ncsn.core.keyed_random import Stream, keyed_uniform
from ncsn.errors import UserError

BALANCED, AS_DATA = "balanced", "data"
_MOST_SHOWN = 20


@dataclass(frozen=True)
class Classes:
    """The classes of the training images, in the order of their labels 0, 1, ..."""

    names: tuple[str, ...]
    counts: tuple[int, ...]  # training images of each

    @classmethod
    def of(cls, facts: Mapping[str, Any] | None) -> Classes | None:
        """From the plain values of `dataclasses.asdict`."""
        return None if facts is None else cls(tuple(facts["names"]), tuple(facts["counts"]))

    def index(self, text: str, *, key: str) -> int:
        """The label of the class with this name, or else this number; `UserError` with all names if there is none."""
        if text in self.names:
            return self.names.index(text)
        if text.isdecimal() and int(text) < len(self.names):
            return int(text)
        raise UserError(
            key, "no such class", hint=f"use {BALANCED}, {AS_DATA} or one of {_shown(self.names)}", value=text
        )


def require_same_classes(num_classes: int | None, names: Sequence[str], *, where: str) -> None:
    """Refuse data with another number of classes than the network's."""
    if num_classes is None or num_classes == len(names):
        return
    found = f"{len(names)}: {_shown(names)}" if names else "0"
    hint = f"set it to {len(names)}" if names else "set it to null, or sort the images into one subfolder per class"
    raise UserError("data.num_classes", f"{where} has {found}", hint=hint, value=num_classes)


def labels_of_images(
    label: str, *, num_classes: int, classes: Classes | None, seed: int, first: int, count: int
) -> Tensor:
    """Labels of images `first .. first + count` of a seed by `sampling.label`, int64 [count].

    They are a function of (seed, image). Balanced classes come in turn, and need no facts about them; classes as in the
    data are drawn in proportion to how often training saw each.
    """
    if label == BALANCED:
        return torch.arange(first, first + count) % num_classes
    assert classes is not None
    if label == AS_DATA:
        ends = torch.tensor(classes.counts, dtype=torch.float64).cumsum(0)
        u = keyed_uniform(seed, stream=Stream.LABEL_CHOICE, first=first, count=count, size=1)[:, 0]
        return torch.bucketize(u.double() * ends[-1], ends, right=True).clamp_(max=num_classes - 1)
    return torch.full((count,), classes.index(label, key="sampling.label"))


def require_label(label: str, classes: Classes | None, *, key: str = "sampling.label") -> None:
    """Refuse a label that names no class of a network that knows classes; `key` is what set it."""
    if classes is not None and label not in (BALANCED, AS_DATA):
        classes.index(label, key=key)


def _shown(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more
