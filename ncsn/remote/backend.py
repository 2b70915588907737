"""What a backend is: it runs a step's command somewhere else and returns when it is done.

The command is the same `ncsn <step>` that a person types, with the local backend. Config, result, progress and errors
go through the store, so that a backend carries nothing but the command.
"""

from __future__ import annotations

import hashlib
import re
import signal
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from ncsn import storage

TERMINATED = 128 + signal.SIGTERM
MAX_NAME = 47
"""KubeRay makes names of 53 characters from a RayJob's by adding 6."""

_DIGEST_CHARACTERS = 8


@dataclass(frozen=True)
class RemoteStep:
    """One step to run elsewhere.

    Attributes:
        run: Name of the run.
        step: Name of the step.
        uri: Folder of the step in the store, which keeps its log and the launcher's lease.
        command: Command and arguments, which take `--lease URI` as well.
        facts: What names the step's records elsewhere, such as its MLflow run, for whoever looks at the cluster.
        mistaken: Whether the step has recorded a mistake since it was started, which another attempt would repeat.
    """

    run: str
    step: str
    uri: str
    command: tuple[str, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    mistaken: Callable[[], bool] = lambda: False


class Conflict(Exception):
    """There is something of that name."""


class RemoteFailure(RuntimeError):
    """The step ended elsewhere without success; the message is one line with the reason."""


class RemoteLost(RemoteFailure):
    """The step's record is gone, so nobody can say how it ended; if it did, its result is in the store."""


class Backend(Protocol):
    """Runs steps elsewhere."""

    def execute(self, step: RemoteStep) -> None:
        """Run the step to its end, or attach to it if it is running.

        Raises:
            RemoteFailure: if it ended without success.
            PermissionError: naming the right that is missing.
            ConnectionError: if the other side has not answered for long.
            UserError: for a mistake in the settings.
        """


def job_name(run: str, step: str, uri: str) -> str:
    """`ncsn-<run>-<step>-<digest>`, at most 47 characters of DNS-1035; the same for every attempt.

    Args:
        run: Name of the run.
        step: Name of the step.
        uri: Folder of the step in the store.
    """
    digest = hashlib.sha256(uri.encode()).hexdigest()[:_DIGEST_CHARACTERS]
    readable = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    room = MAX_NAME - len(f"ncsn--{step}-{digest}")
    return f"ncsn-{readable[:room].strip('-')}-{step}-{digest}"


def command_digest(command: tuple[str, ...]) -> str:
    """Tells another attempt at the same work from other work under the same name."""
    return hashlib.sha256("\0".join(command).encode()).hexdigest()[:16]


@contextmanager
def ended_on_sigterm(end: Callable[[], None]) -> Iterator[None]:
    """On SIGTERM call `end` first and clean up afterwards: KFP gives a canceled task very little time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        end()
        sys.exit(TERMINATED)

    before: Any = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(line: str) -> None:
    """Tell whoever waits. A KFP task's stderr is its log."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


_PAUSES = (1.0, 5.0)
_LAST_READ_SECONDS = 15.0
_SAID = "error: "
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# What Ray prints of itself on a busy node, and gets over.
_HARMLESS = re.compile(r"GetTimeoutError|PlacementGroupCleaner")
_TRACEBACK = "Traceback (most recent call last)"
# Ray puts the process before a worker's line: "(RayTrainWorker pid=7, ip=10.0.0.2) ValueError: ...".
_ERROR = re.compile(
    r"^(?:\([^)]*\)\s*)?((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Expired|Exit|NotFound)(?:: .*)?)$"
)


def first_error(lines: Iterable[str]) -> str | None:
    """The exception of the first traceback, which is the failed worker's: what others print afterwards follows it.

    Without a traceback it is what `ncsn` itself said last.
    """
    in_traceback, said = False, None
    for line in (_COLOUR.sub("", line) for line in lines):
        if _HARMLESS.search(line):
            in_traceback = False
        elif _TRACEBACK in line:
            in_traceback = True
        elif in_traceback and (match := _ERROR.match(line.strip())):
            return match[1]
        elif line.startswith(_SAID):
            said = line.removeprefix(_SAID)
    return said


class DriverLog(ABC):
    """A context that shows the log as it comes and publishes it at `uri` in the end.

    A stream may be cut at any time, so it is opened again and again. The outcome of the job is never read from here.

    Args:
        uri: Where the whole log is kept in the end.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - __exit__ closes it
        self._job_over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow_all, name="driver-log", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._job_over.set()
        with self._lock:
            self._file.close()

    def finish(self) -> None:
        """Read what is left, and publish all of it."""
        self.stop_following()
        self.publish()

    def stop_following(self) -> None:
        """Read what is left."""
        self._job_over.set()
        self._thread.join(_LAST_READ_SECONDS)

    def publish(self) -> None:
        """Keep at `uri` all that was read."""
        content = self._content()
        if content:
            storage.write_bytes(self.uri, content)

    def lines(self) -> Iterator[str]:
        """What came so far."""
        yield from self._content().decode(errors="replace").splitlines()

    @abstractmethod
    def follow(self) -> bool:
        """Take the lines that are new until the stream ends; whether there were any.

        Raises:
            PermissionError: if it may not be read.
            ConnectionError: if it has not started, or is cut.
        """

    def take(self, line: bytes) -> None:
        """Show one line and keep it."""
        with self._lock:
            if not self._file.closed:
                self._file.seek(0, 2)
                self._file.write(line + b"\n")
        say(line.decode(errors="replace"))

    def _content(self) -> bytes:
        with self._lock:
            self._file.seek(0)
            return self._file.read()

    def _follow_all(self) -> None:
        pause = _PAUSES[0]
        while True:
            # Asked before reading, so that all that was written until the job was over is read.
            over = self._job_over.is_set()
            try:
                news = self.follow()
            except PermissionError as error:
                say(f"the log cannot be shown: {error}")
                return
            except ConnectionError:
                news = True
            if over:
                return
            pause = _PAUSES[0] if news else min(2 * pause, _PAUSES[1])
            self._job_over.wait(pause)
