"""The history of a training: its curves, with the load of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ncsn import storage
from ncsn.process import now_ms


@dataclass
class TrainingHistory:
    """The curves of a training run: figures are made from this file, without a tracking server."""

    # It is published with each checkpoint and cut to the checkpoint that training resumes from, so that no stretch is
    # in it twice.
    uri: str
    images_seen: list[int] = field(default_factory=list)  # of each point, ascending
    points: list[dict[str, float]] = field(default_factory=list)  # metric name -> value
    system: list[dict[str, float]] = field(default_factory=list, compare=False)  # load of the machine at each point
    times: list[int] = field(default_factory=list, compare=False)  # of each point, in milliseconds since 1970

    def add(
        self, point: dict[str, float], images_seen: int, *, system: dict[str, float] | None = None, when: int = 0
    ) -> None:
        """Append a point."""
        self.images_seen.append(images_seen)
        self.points.append(point)
        self.system.append(system or {})
        self.times.append(when or now_ms())

    def publish(self) -> None:
        """Write all points."""
        stored = {"images_seen": self.images_seen, "points": self.points, "system": self.system, "times": self.times}
        storage.write_json(self.uri, stored)

    def curve(self, name: str) -> NDArray[np.float64]:
        """Values [P] of one curve, NaN where a point lacks it."""
        pairs = zip(self.points, self.system, strict=True)
        return np.array([point.get(name, system.get(name, np.nan)) for point, system in pairs])

    def losses(self, names: Sequence[str]) -> NDArray[np.float64]:
        """Values [P, S] of several curves, such as those of the levels; NaN where no image had that level."""
        return np.stack([self.curve(name) for name in names], axis=1)


def load_history(uri: str, *, until: int | None = None) -> TrainingHistory:
    """The stored points up to and including `until` images seen; none if there is no file."""
    if (stored := storage.find_json(uri)) is None:
        return TrainingHistory(uri)
    count = sum(1 for seen in stored["images_seen"] if until is None or seen <= until)
    return TrainingHistory(
        uri,
        stored["images_seen"][:count],
        stored["points"][:count],
        # Earlier versions did not keep these.
        stored.get("system", [{}] * count)[:count],
        stored.get("times", [now_ms()] * count)[:count],
    )
