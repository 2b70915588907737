"""A training worker that sends curves, without training."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ncsn import storage
from ncsn.process import now_ms
from ncsn.runs.curves import PREVIEW
from ncsn.runs.folder import RunFolder
from ncsn.runs.history import load_history
from ncsn.tracking.live import LiveMetrics

DEAD = "http://127.0.0.1:9"  # Discard's port, on which nothing listens here
LEVEL, LOSS = "train/loss_level_1", "train/loss"


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, format="PNG")
    return buffer.getvalue()


class Worker:
    """Logs and keeps points as the training loop does."""

    def __init__(self, sink: LiveMetrics, folder: RunFolder, *, since: int) -> None:
        self.sink, self.folder = sink, folder
        self.history = load_history(folder.history, until=since - 1)

    def train(self, steps: range) -> None:
        for step in steps:
            point = {LEVEL: -float(step), LOSS: float(step)}
            when = now_ms()
            self.sink.log({"system/cpu": 1.0} | point, step, when)
            self.history.add(point, step, system={"system/cpu": 1.0}, when=when)

    def save(self) -> None:
        self.history.publish()
        storage.write_bytes(self.folder.preview(self.history.images_seen[-1]), png())
        self.sink.log_picture(png(), PREVIEW, self.history.images_seen[-1], self.history.times[-1])
