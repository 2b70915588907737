"""The history of a training: its curves and their names, with the load of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ncsn import storage

Array = NDArray[np.float64]

EDM_LOSS = "train/loss_edm"  # mean of the weight of Karras et al. times the normalized loss
LOSS, GAP = "val/loss", "val/gap"  # means over the noise levels, weighted as in training
RATE = "train/images_per_second"  # since the point before, or since training resumed
HELD_OUT_EDM = "val/loss_edm"  # their mean with the weight of Karras et al.: that objective on held-out images
PREVIEW = "train/preview"  # no curve but a series of images that training made of itself

RISE = 0.01  # of the held-out loss over its lowest value; less may be the noise of the weights


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

    def add(self, point: dict[str, float], images_seen: int, *, system: dict[str, float], when: int) -> None:
        self.images_seen.append(images_seen)
        self.points.append(point)
        self.system.append(system)
        self.times.append(when)

    def publish(self) -> None:
        storage.write_json(self.uri, {name: values for name, values in vars(self).items() if name != "uri"})

    def curve(self, name: str) -> Array:
        """Values [P] of one curve, NaN where a point lacks it."""
        pairs = zip(self.points, self.system, strict=True)
        return np.array([point.get(name, system.get(name, np.nan)) for point, system in pairs])

    @property
    def images_per_second(self) -> float:
        """Of the whole training, however often it was interrupted, without its starts; 0 without a point."""
        images = np.array(self.images_seen)
        seconds = np.diff(images, prepend=0) / self.curve(RATE)
        return float(images.max(initial=0) / max(seconds.sum(), 1e-9))


def load_history(uri: str, *, until: int | None = None) -> TrainingHistory:
    """The stored points up to and including `until` images seen; none if there is no file."""
    if (stored := storage.find_json(uri)) is None:
        return TrainingHistory(uri)
    count = sum(1 for seen in stored["images_seen"] if until is None or seen <= until)
    return TrainingHistory(uri, **{name: values[:count] for name, values in stored.items()})


def loss_names(sigmas: Sequence[float]) -> list[str]:
    """Names of the curves of the bins with these sigmas [S], with three digits or as many as tell all apart."""
    for digits in range(3, 9):
        texts = [f"{sigma:.{digits}g}" for sigma in sigmas]
        if len(set(texts)) == len(texts):
            break
    return [f"train/loss_sigma_{text}" for text in texts]


@dataclass(frozen=True)
class HeldOutCurves:
    """The held-out loss over training."""

    images_seen: Array  # of each measurement [P], P >= 1
    loss: Array  # mean over the noise levels [P]
    gap: Array  # by how much it exceeds that of training images [P]

    @property
    def lowest_at(self) -> int | None:
        """Images seen where the loss was lowest, if it has risen since."""
        lowest = int(np.argmin(self.loss))
        return int(self.images_seen[lowest]) if self.loss[-1] > (1 + RISE) * self.loss[lowest] else None


def held_out_curves(history: TrainingHistory) -> HeldOutCurves | None:
    """The curves in the history of a run; None if the held-out loss was never measured."""
    pairs = zip(history.images_seen, history.points, strict=True)
    found = [(seen, point[LOSS], point[GAP]) for seen, point in pairs if {LOSS, GAP} <= point.keys()]
    return HeldOutCurves(*np.array(found, np.float64).T) if found else None
