"""What an MLflow run has still to be told, on a local disk, so that neither an outage nor a killed process loses it.

    <folder>/<MLflow run id>.jsonl        one line per entry, appended
    <folder>/<MLflow run id>.jsonl.sent   how many bytes of it the server has answered for

An entry keeps its time, and MLflow takes equal (name, time, step, value) once, so that sending again is harmless.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ncsn import storage
from ncsn.data.training_images import cache_folder

SUFFIX = ".jsonl"


class JournalInUseError(OSError):
    """Another process is writing or sending this journal."""


@dataclass(frozen=True)
class Entry:
    """One thing to record.

    Attributes:
        series: What it continues; of one series only growing steps are recorded.
        step: Images seen.
        time: Milliseconds since 1970.
        metrics: Name -> value.
        png: A picture named after the series, base64; empty if there is none.
        status: How the run ended; empty if it has not.
    """

    series: str
    step: int
    time: int
    metrics: dict[str, float] = field(default_factory=dict)
    png: str = ""
    status: str = ""

    @property
    def count(self) -> int:
        """Metrics, or 1 for anything else."""
        return len(self.metrics) or 1


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


class Journal:
    """The journal of one run, held by one process at a time: the kernel lets go of it when that process ends.

    Args:
        folder: URI that keeps the journals of a pipeline run. If it is not local, the journal itself is in the node's
            cache folder, and `secure` copies what is unsent to `folder`, where a process on another node finds it.
        run_id: The MLflow run.
        patience: Seconds to wait for a process that holds it.

    Raises:
        JournalInUseError: if another process holds it.
        OSError: if the disk cannot be written.
    """

    def __init__(self, folder: str, run_id: str, *, patience: float = 0.0) -> None:
        local = Path(folder) if storage.is_local(folder) else cache_folder() / "tracking"
        local.mkdir(parents=True, exist_ok=True)
        self.path = local / f"{run_id}{SUFFIX}"
        self._copy = None if storage.is_local(folder) else storage.join(folder, self.path.name)
        self._sent_path = self.path.with_name(f"{self.path.name}.sent")
        self._file = _open_locked(self.path, patience)
        self._sent = int(self._sent_path.read_text()) if self._sent_path.exists() else 0
        self._last: dict[str, int] = {}
        self.unsent = 0
        """Metrics and other entries that the server has not answered for."""
        for entry, end in self._entries(0):
            self._note(entry)
            if end > self._sent:
                self.unsent += entry.count
        self._secured = self.unsent
        self._end_torn_line()
        self._restore()

    def append(self, entry: Entry) -> bool:
        """Add an entry, which then survives this process; False if its series has passed its step already."""
        if entry.step <= self._last.get(entry.series, -1):
            return False
        os.write(self._file, json.dumps(asdict(entry)).encode() + b"\n")
        self._note(entry)
        self.unsent += entry.count
        return True

    def oldest(self, limit: int) -> list[tuple[Entry, int]]:
        """The first unsent entries with about `limit` metrics, each with the position where it ends."""
        found: list[tuple[Entry, int]] = []
        count = 0
        for entry, end in self._entries(self._sent):
            if found and count + entry.count > limit:
                break
            found.append((entry, end))
            count += entry.count
        return found

    def acknowledge(self, entries: list[tuple[Entry, int]]) -> None:
        """Note that these, the oldest, need not be sent any more."""
        self._sent = entries[-1][1]
        temporary = self._sent_path.with_name(f"{self._sent_path.name}.tmp")
        temporary.write_text(str(self._sent))
        temporary.replace(self._sent_path)
        self.unsent -= sum(entry.count for entry, _ in entries)

    def secure(self) -> None:
        """Copy what is unsent to the store, if the journal is not there itself."""
        if self._copy is None or self.unsent == self._secured:
            return
        with self.path.open("rb") as stream:
            stream.seek(self._sent)
            storage.write_bytes(self._copy, stream.read())
        self._secured = self.unsent

    def close(self) -> None:
        """Let go of the journal; with nothing unsent it is deleted."""
        try:
            if self.unsent:
                self.secure()
            else:
                self.path.unlink(missing_ok=True)
                self._sent_path.unlink(missing_ok=True)
                if self._copy is not None:
                    storage.delete_file(self._copy)
        finally:
            os.close(self._file)

    def _note(self, entry: Entry) -> None:
        self._last[entry.series] = max(entry.step, self._last.get(entry.series, -1))

    def _entries(self, start: int) -> Iterator[tuple[Entry, int]]:
        with self.path.open("rb") as stream:
            stream.seek(start)
            end = start
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                if entry := _parse(line):
                    yield entry, end

    def _end_torn_line(self) -> None:
        """A process that was killed may have left half a line; the rest of the file must not become part of it."""
        with self.path.open("rb") as stream:
            if stream.seek(0, os.SEEK_END) and stream.seek(-1, os.SEEK_END) and stream.read(1) != b"\n":
                os.write(self._file, b"\n")

    def _restore(self) -> None:
        """Take over what a process on another node could not send."""
        if self._copy is None or not storage.exists(self._copy):
            return
        before = self._last.copy()
        for line in storage.read_bytes(self._copy).splitlines(keepends=True):
            entry = _parse(line)
            if entry is not None and entry.step > before.get(entry.series, -1):
                self.append(entry)


@contextmanager
def held(folder: str, run_id: str, *, patience: float = 0.0) -> Iterator[Journal]:
    """The journal of a run for the length of a block."""
    journal = Journal(folder, run_id, patience=patience)
    try:
        yield journal
    finally:
        journal.close()


def runs_with_journal(folder: str) -> list[str]:
    """Ids of the MLflow runs below `folder` that something may be unsent for."""
    return [name.removesuffix(SUFFIX) for name in storage.list_names(folder) if name.endswith(SUFFIX)]


def _parse(line: bytes) -> Entry | None:
    try:
        return Entry(**json.loads(line))
    except (ValueError, TypeError):  # half a line
        return None


def _open_locked(path: Path, patience: float) -> int:
    """A descriptor for appending to `path` that holds its lock."""
    give_up = time.monotonic() + patience
    while True:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
                return file  # and not one that its last holder has deleted meanwhile
        except BlockingIOError:
            if time.monotonic() >= give_up:
                os.close(file)
                raise JournalInUseError(f"{path} is in use by another process") from None
            time.sleep(0.1)
        os.close(file)
