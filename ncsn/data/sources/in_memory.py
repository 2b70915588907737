"""What the small datasets share: splits in memory, the check of their labels, and errors of their download."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from ncsn.data.pixels import Fit
from ncsn.data.sources.base import Example
from ncsn.errors import UserError


@dataclass(frozen=True)
class Arrays:
    """A split that is in memory."""

    images: np.ndarray  # uint8 [N, H, W, C], of any size
    labels: np.ndarray  # [N]
    fit: Fit
    in_tasks: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.labels)

    def section(self, first: int, last: int) -> Arrays:
        """Images `first .. last`."""
        return replace(self, images=self.images[first:last], labels=self.labels[first:last])

    def stream(self, *, cores: int | None = None) -> Iterator[Example]:  # noqa: ARG002
        """Each image; see `Split`."""
        labels = self.labels.tolist()
        if self.fit.keeps(self.images.shape[1:]):
            return map(Example, self.images, labels)
        return (
            Example(fitted.image, label, fitted.conversions)
            for fitted, label in zip(map(self.fit.array, self.images), labels, strict=True)
        )


def require_labels(labels: np.ndarray, *, num_classes: int, name: str) -> None:
    """Refuse labels outside `0 .. num_classes`, naming their file."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise UserError(name, f"gives image {wrong[0]} label {labels[wrong[0]]}; labels are 0 to {num_classes - 1}")


@contextmanager
def downloading(what: str, files: str, root: Path) -> Iterator[None]:
    """Turn what torchvision raises into one line that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"torchvision could not download {what} into {root}: {reason}; put {files} there by hand"
        ) from error
