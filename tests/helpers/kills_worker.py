"""A real kill of a training's process, in a module that the workers can import."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from ncsn.model.checkpoint_store import CheckpointStore
from ncsn.progress import Progress


class KillsWorker(Progress):
    """Kills its process, that of rank 0, once, when training has seen that many images, and makes the file `killed`.

    With `cut`, a folder of checkpoints, the newest one loses half of its weights first.
    """

    def __init__(self, at: int, killed: Path, *, cut: Path | None = None) -> None:
        super().__init__()
        self.at, self.killed, self.cut = at, killed, cut

    def changed(self) -> None:
        if self.done < self.at or self.killed.exists():
            return
        if self.cut is not None:
            weights = self.cut / next(CheckpointStore(str(self.cut)).names()) / "weights.safetensors"
            os.truncate(weights, weights.stat().st_size // 2)
        self.killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
