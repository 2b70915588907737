"""The checkpoints of a run: the newest ones, and the best.

    <run>/checkpoints/images-000000160/    a checkpoint, complete when `checkpoint.json` is in it
    <run>/best/images-000000160/           a copy of the best one
    <run>/best/best.json                   its name, its loss and which loss that is; readers begin here

By default, best means the least loss over the stretch of training that ends in the checkpoint, with each noise level
counting alike. It guards against a training that goes wrong late. It does not choose the best samples: those need to be
drawn and measured (`train.best_by: fid`, `ncsn select`).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path

from ncsn import storage
from ncsn.model import checkpoint, index

CHECKPOINTS = "checkpoints"
BEST = "best"
BEST_RECORD = "best.json"
TRAINING_LOSS = "training"  # by which the best one is chosen, as `train.best_by` names it
NEWEST = 3  # of the checkpoints that stay whole where all are kept

_logger = logging.getLogger(__name__)


class CheckpointStore:
    """Publishes checkpoints in a thread, and finds the newest whole one.

    Args:
        uri: Folder of the checkpoints.
        keep: How many of the newest stay whole, or None for all.
        thin_every: Training images. Of the older ones, the first after each multiple keeps what images need; None for
            none.
        best: Folder that keeps a copy of the one with the least loss, or None.
        best_by: Which loss that is; the loss of a checkpoint that another one chose is not compared.
    """

    def __init__(
        self,
        uri: str,
        *,
        keep: int | None = None,
        thin_every: int | None = None,
        best: str | None = None,
        best_by: str = TRAINING_LOSS,
    ) -> None:
        self.uri = uri
        self.notes: list[str] = []  # about damaged checkpoints, for people
        self._keep, self._thin_every, self._best, self._best_by = keep, thin_every, best, best_by
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def names(self) -> Iterator[str]:
        """Complete checkpoints, the newest first."""
        for name in reversed(self._folders()):
            if storage.exists(storage.join(self.uri, name, index.INDEX)):
                yield name

    def newest(self) -> str | None:
        """The newest whole checkpoint. Damaged ones are deleted with a warning: training makes them again.

        For one process at a time, before it publishes.
        """
        if storage.is_local(self.uri):
            storage.remove_scratch(self.uri)
        damaged: list[str] = []
        for name in self.names():
            with self.open(name) as folder:
                try:
                    if not index.resumable(folder):
                        continue
                    index.verify(folder, needs=index.FILES)
                except index.DamagedError as damage:
                    damaged.append(f"checkpoint {name} is damaged ({damage.reason})")
                else:
                    self._note(damaged, resumed_from=name)
                    return name
            storage.delete_folder(storage.join(self.uri, name))
        self._note(damaged, resumed_from="the start")
        return None

    def open(self, name: str) -> AbstractContextManager[Path]:
        """Context manager: the checkpoint as a local folder."""
        return storage.local_copy(storage.join(self.uri, name))

    def publish(self, write: Callable[[Path], None], *, name: str, loss: float | None) -> None:
        """Begin to store what `write` writes into an empty local folder.

        Waits for the checkpoint before, so that a slow store does not fill this machine's memory, and raises its error.
        Without a loss this checkpoint is no candidate for the best one.
        """
        self.later(partial(self._store, write, name, loss))

    def later(self, work: Callable[[], None]) -> None:
        """Do work in the thread, after what was begun before; waits for that, and raises its error."""
        self.wait()
        self._pending = self._thread.submit(work)

    def wait(self) -> None:
        """Wait until everything is stored. Raises what went wrong; the checkpoints before are still there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _store(self, write: Callable[[Path], None], name: str, loss: float | None) -> None:
        target = storage.join(self.uri, name)
        with storage.scratch_folder(self.uri) as folder:
            write(folder)
            storage.delete_folder(target)  # the rest of an upload that was cut short
            storage.publish_folder(folder, target, marker=index.INDEX)
            if self._best is not None and loss is not None:
                local = Path(target) if storage.is_local(target) else folder
                _offer(self._best, local, name=name, loss=loss, by=self._best_by)
        if self._keep is not None:
            folders, kept = self._folders(), set(islice(self.names(), self._keep))
            # The rest of an upload that was cut short does not count. A newer one is overwritten later.
            self._reduce([old for old in folders[: folders.index(name)] if old not in kept])

    def _reduce(self, names: Sequence[str]) -> None:
        """Thin or delete these checkpoints, the oldest first."""
        last = -1  # the number of the last stretch of `thin_every` images that has a checkpoint
        for name in names:
            uri = storage.join(self.uri, name)
            stretch = last if self._thin_every is None else checkpoint.images_seen_at(name) // self._thin_every
            if stretch > max(last, 0) and storage.exists(storage.join(uri, index.INDEX)):
                last = stretch
                if storage.exists(storage.join(uri, "optimizer.safetensors")):
                    index.thin(uri)
            else:
                storage.delete_folder(uri)

    def _folders(self) -> list[str]:
        found = [name for name in storage.list_names(self.uri) if checkpoint.FOLDER_NAME.fullmatch(name)]
        return sorted(found, key=checkpoint.images_seen_at)

    def _note(self, damaged: list[str], *, resumed_from: str) -> None:
        for what in damaged:
            self.notes.append(f"{what}: training resumed from {resumed_from}")
            _logger.warning(self.notes[-1])


def _offer(best: str, folder: Path, *, name: str, loss: float, by: str) -> None:
    """Copy the checkpoint in the local `folder` to `best` if its loss is less than that of the one there."""
    record = storage.join(best, BEST_RECORD)
    found = storage.find_json(record)
    if found is not None and found.get("by", TRAINING_LOSS) == by and loss >= found["loss"]:
        return
    with storage.scratch_folder(best) as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        storage.publish_folder(copy, storage.join(best, name), marker=index.INDEX, replace=True)
    storage.write_text(record, json.dumps({"checkpoint": name, "loss": loss, "by": by}))
    for other in storage.list_names(best):
        if other not in (name, BEST_RECORD):
            storage.delete_folder(storage.join(best, other))
