"""What a backend is: it runs a step's command somewhere else and returns when it is done.

The command is the same `ncsn <step>` that a person types, with the local backend. Config, result, progress and errors
go through the store, so that a backend carries nothing but the command.
"""

from __future__ import annotations

import hashlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

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
