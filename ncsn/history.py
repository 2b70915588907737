"""The curves of a run's training, kept in the store beside its checkpoints.

MLflow has the same numbers for looking at; this file is what figures are made from, without a tracking server. It is
published with each checkpoint and cut to the checkpoint that training resumes from, so no stretch is in it twice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ncsn import storage

LEVEL_LOSS = "train/loss_level_"
"""Before the level's number in a curve's name."""


@dataclass
class TrainingHistory:
    """Points of all curves.

    Attributes:
        uri: The file.
        images_seen: Where each point stands, ascending.
        points: Metric name -> value of each point.
    """

    uri: str
    images_seen: list[int] = field(default_factory=list)
    points: list[dict[str, float]] = field(default_factory=list)

    def add(self, point: dict[str, float], images_seen: int) -> None:
        """Take the curves' next point."""
        self.images_seen.append(images_seen)
        self.points.append(point)

    def publish(self) -> None:
        """Write all points."""
        storage.write_text(self.uri, json.dumps({"images_seen": self.images_seen, "points": self.points}))

    def curve(self, name: str) -> NDArray[np.float64]:
        """Values [P] of one curve, NaN where a point lacks it."""
        return np.array([point.get(name, np.nan) for point in self.points])

    def level_losses(self, num_levels: int) -> NDArray[np.float64]:
        """Normalised loss [P, L] of each level; NaN where no image of the stretch had it."""
        width = len(str(num_levels - 1))
        return np.stack([self.curve(level_loss(level, width)) for level in range(num_levels)], axis=1)


def level_loss(level: int, width: int) -> str:
    """Name of a level's curve, its number padded to `width` digits so that names sort."""
    return f"{LEVEL_LOSS}{level:0{width}d}"


def load_history(uri: str, *, until: int | None = None) -> TrainingHistory:
    """The stored points up to and including `until` images seen; none if there is no file."""
    try:
        stored = storage.read_json(uri)
    except FileNotFoundError:
        return TrainingHistory(uri)
    count = sum(1 for seen in stored["images_seen"] if until is None or seen <= until)
    return TrainingHistory(uri, stored["images_seen"][:count], stored["points"][:count])
