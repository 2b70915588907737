"""The checkpoints of a run: `<run>/checkpoints/images-000000160/`, complete when `checkpoint.json` is in it.

`resume-000000224/` is one between them, which only a resume reads. There is at most one, until the next of any kind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path

from ncsn import storage
from ncsn.model import checkpoint
from ncsn.runs.folder import INDEX, RESUME, checkpoint_names, images_seen_at, resumable

NEWEST = 3  # of the checkpoints that stay whole where all are kept

_logger = logging.getLogger(__name__)


class CheckpointStore:
    """Publishes checkpoints in a thread, and finds the newest whole one.

    Args:
        uri: Folder of the checkpoints.
        keep: How many of the newest stay whole, or None for all.
        thin_every: Training images. Of the older ones, the first after each multiple keeps what images need; None for
            none.
    """

    def __init__(self, uri: str, *, keep: int | None = None, thin_every: int | None = None) -> None:
        self.uri = uri
        self.notes: list[str] = []  # about damaged checkpoints, for people
        self._keep, self._thin_every = keep, thin_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def names(self) -> Iterator[str]:
        """Complete checkpoints, the newest first, without one that is only to resume from."""
        return (name for name in resumable(self.uri) if not name.startswith(RESUME))

    def newest(self) -> str | None:
        """The newest whole checkpoint. Damaged ones are deleted with a warning: training makes them again.

        For one process at a time, before it publishes.
        """
        if storage.is_local(self.uri):
            storage.remove_scratch(self.uri)
        damaged, found = list[str](), None
        for name in resumable(self.uri):
            with self.open(name) as folder:
                try:
                    files = checkpoint.verify(folder)
                except checkpoint.DamagedError as damage:
                    damaged.append(f"checkpoint {name} is damaged ({damage.reason})")
                    storage.delete(storage.join(self.uri, name))
                    continue
            if files >= set(checkpoint.FILES):  # others have what images need alone
                found = name
                break
        for what in damaged:
            self.notes.append(f"{what}: training resumed from {found or 'the start'}")
            _logger.warning(self.notes[-1])
        return found

    def open(self, name: str) -> AbstractContextManager[Path]:
        """Context manager: the checkpoint as a local folder."""
        return storage.local_copy(storage.join(self.uri, name))

    def publish(self, write: Callable[[Path], None], *, name: str) -> None:
        """Begin to store what `write` writes into an empty local folder.

        Waits for the checkpoint before, so that a slow store does not fill this machine's memory, and raises its error.
        """
        self.later(partial(self._store, write, name))

    def later(self, work: Callable[[], None]) -> None:
        """Do work in the thread, after what was begun before; waits for that, and raises its error."""
        self.wait()
        self._pending = self._thread.submit(work)

    def wait(self) -> None:
        """Wait until everything is stored. Raises what went wrong; the checkpoints before are still there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _store(self, write: Callable[[Path], None], name: str) -> None:
        target = storage.join(self.uri, name)
        with storage.scratch_folder(self.uri) as folder:
            write(folder)
            storage.delete(target)  # the rest of an upload that was cut short
            storage.publish_folder(folder, target, marker=INDEX)
        for old in checkpoint_names(self.uri):
            if old.startswith(RESUME) and old != name:
                storage.delete(storage.join(self.uri, old))
        if self._keep is not None and not name.startswith(RESUME):
            folders, kept = checkpoint_names(self.uri), set(islice(self.names(), self._keep))
            # The rest of an upload that was cut short does not count. A newer one is overwritten later.
            self._reduce([old for old in folders[: folders.index(name)] if old not in kept])

    def _reduce(self, names: Sequence[str]) -> None:
        """Thin or delete these checkpoints, the oldest first."""
        last = -1  # the number of the last stretch of `thin_every` images that has a checkpoint
        for name in names:
            uri = storage.join(self.uri, name)
            stretch = last if self._thin_every is None else images_seen_at(name) // self._thin_every
            if stretch > max(last, 0) and storage.exists(storage.join(uri, INDEX)):
                last = stretch
                if storage.exists(storage.join(uri, "optimizer.safetensors")):
                    checkpoint.thin(uri)
            else:
                storage.delete(uri)
