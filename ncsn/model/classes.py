"""The classes that a network knows, and the labels that name one.

A label is the index of a class, or -1 for none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ncsn.errors import UserError

BALANCED, AS_DATA = "balanced", "data"
_MOST_SHOWN = 20


@dataclass(frozen=True)
class Classes:
    """The classes of the training images, in the order of their labels 0, 1, ..."""

    names: tuple[str, ...]
    counts: tuple[int, ...]  # training images of each

    def index(self, text: str, *, key: str) -> int:
        """The label of the class with this name, or else this number; `UserError` with all names if there is none.

        Where names are numbers, no other number counts: it would be taken for a name.
        """
        if text in self.names:
            return self.names.index(text)
        number = text.isdecimal() and len(text) < 10 and not any(map(str.isdecimal, self.names))
        if number and int(text) < len(self.names):
            return int(text)
        raise UserError(key, "no such class", hint=f"use one of {_shown(self.names)}", value=text)

    def counts_of(self, label: Mapping[str, int]) -> list[int]:
        """How many images of each class a label by class asks for."""
        asked = [0] * len(self.names)
        for name, count in label.items():
            asked[self.index(name, key="sampling.label")] += count
        return asked


def require_same_classes(num_classes: int | None, names: Sequence[str], *, where: str) -> None:
    """Refuse data with another number of classes than the network's."""
    if num_classes is None or num_classes == len(names):
        return
    found = f"{len(names)}: {_shown(names)}" if names else "0"
    hint = f"set it to {len(names)}" if names else "set it to null, or sort the images into one subfolder per class"
    raise UserError("data.num_classes", f"{where} has {found}", hint=hint, value=num_classes)


def require_label(label: str | Mapping[str, int], classes: Classes | None) -> None:
    """Refuse a `sampling.label` that names no class of a network that knows classes."""
    if classes is not None and label not in (BALANCED, AS_DATA):
        for name in label if isinstance(label, Mapping) else [label]:
            classes.index(name, key="sampling.label")


def images_of(label: Any) -> int | None:
    """How many images a label by class asks for, as far as its values are numbers; None for another label."""
    return sum(n for n in label.values() if isinstance(n, int)) if isinstance(label, Mapping) else None


def _shown(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more
