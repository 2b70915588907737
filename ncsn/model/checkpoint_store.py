"""The checkpoints of a run: the newest whole one, and the best.

    <run>/best/images-000000160/    a whole checkpoint
    <run>/best/best.json            its name and its loss; readers begin here

Best means the least loss over the stretch of training that ends in the checkpoint, with each noise level counting
alike. It guards against a training that goes wrong late. It does not choose the best samples: those need to be drawn
and measured (`ncsn evaluate`).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ncsn import storage
from ncsn.model import checkpoint

FOLDER = "best"
RECORD = "best.json"


class BestCheckpoint:
    """Keeps a copy of the best checkpoint of a run.

    Args:
        run_uri: Folder of the run.
    """

    def __init__(self, run_uri: str) -> None:
        self.uri = storage.join(run_uri, FOLDER)

    def record(self) -> dict[str, Any] | None:
        """`checkpoint`, the name of the folder, and `loss`; None before the first."""
        file = storage.join(self.uri, RECORD)
        if not storage.exists(file):
            return None
        record: dict[str, Any] = storage.read_json(file)
        return record

    def offer(self, folder: Path, *, name: str, loss: float) -> bool:
        """Copy the checkpoint in the local `folder` if no better one is kept.

        Returns:
            Whether it is the best now.
        """
        kept = self.record()
        if loss >= (math.inf if kept is None else kept["loss"]):
            return False
        with storage.scratch_folder(self.uri) as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            storage.publish_folder(copy, storage.join(self.uri, name), marker=checkpoint.INDEX, replace=True)
        storage.write_text(storage.join(self.uri, RECORD), json.dumps({"checkpoint": name, "loss": loss}))
        for other in storage.list_names(self.uri):
            if other not in (name, RECORD):
                storage.delete_folder(storage.join(self.uri, other))
        return True


_logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, below the run's."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of them, beside them."""


@contextmanager
def newest_whole(
    names: Sequence[str], *, opened: Callable[[str], AbstractContextManager[Path]], delete: Callable[[str], None]
) -> Iterator[Path | None]:
    """Context manager: the last of the checkpoints `names` that is whole; None if there is none.

    A damaged one is deleted, with a warning: training makes it again.
    """
    for name in reversed(names):
        with opened(name) as folder:
            try:
                checkpoint.verify(folder)
            except checkpoint.DamagedError as damage:
                _logger.warning("checkpoint %s is damaged (%s): going on from the one before", name, damage.reason)
            else:
                yield folder
                return
        delete(name)
    yield None
