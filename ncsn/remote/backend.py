"""A backend runs a step's command on other machines and returns when it has ended.

The command is the `ncsn <step>` that a person types, with the local backend. Config, result, progress and errors go
through the store, so a backend carries only the command.

A new one is a class with the methods of `Backend`, a branch of `ncsn.remote.open_backend`, a name in
`ComputeConfig.backend` (and in `starts_pods`, if it does), and that name with its checks in
`ncsn.cli.options.BACKENDS`.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

from ncsn import storage
from ncsn.errors import UserError
from ncsn.storage.retry import Retry

TERMINATED = 128 + signal.SIGTERM
MAX_NAME = 47  # KubeRay adds up to 6 characters to a RayJob's name, and a name has at most 53
CHECK_SECONDS = 5.0  # a person waits for `ncsn doctor`
PATIENCE_SECONDS = 900.0  # a head node or an API server is replaced within this time

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteStep:
    """One step to run elsewhere."""

    run: str
    step: str
    uri: str  # folder of the step in the store: holds its log and the launcher's lease
    command: tuple[str, ...]  # decides whether an attempt can attach; `leased_command` is what runs
    facts: Mapping[str, str] = field(default_factory=dict)  # shown with the job, such as the name of its MLflow run
    mistaken: Callable[[], bool] = lambda: False  # whether the step has recorded a mistake, which a retry would repeat

    @property
    def lease(self) -> str:
        """The object that the backend renews with a `Heartbeat` while it waits for the step."""
        return storage.join(self.uri, "lease")

    @property
    def leased_command(self) -> tuple[str, ...]:
        """The command to run. Without its lease, the step would be refused: this process has locked it."""
        return (*self.command, "--lease", self.lease)


class Conflict(Exception):
    """The name is taken."""


class RemoteFailure(RuntimeError):
    """The step failed elsewhere; the message is one line with the reason."""


class RemoteLost(RemoteFailure):
    """The backend no longer knows the step; if it ended well, its result is in the store."""


class NotConfigured(Exception):
    """There is nothing to check."""


@dataclass(frozen=True)
class Check:
    """One thing that `ncsn doctor` looks at."""

    name: str
    probe: Callable[[], str]  # returns what it found; raises NotConfigured, or an error that says what is wrong
    fix: str  # a command
    fixes: Mapping[type[Exception], str] = field(default_factory=dict)  # the fix for these errors


class Backend(Protocol):
    """Runs steps elsewhere. It connects when it is used first."""

    def connect(self) -> None:
        """Connect now, or raise as `execute` does."""

    def execute(self, step: RemoteStep) -> None:
        """Run `step.leased_command` to its end, or attach to it if it is running.

        Ctrl-C, and SIGTERM unless another attempt will follow, must end the work there. Until then the backend renews
        `step.lease`: when it is stale, the step saves and ends.

        Raises:
            RemoteFailure: It failed.
            RemoteLost: The backend no longer knows it.
        """

    def stop(self, *, run: str | None, kfp_run: str | None) -> list[str]:
        """Stop the running jobs of a run, or of a run of KFP; their names."""

    def checks(self) -> Iterator[Check]:
        """What the backend needs."""


@dataclass(frozen=True)
class Found(Generic[T]):
    """Work that has the name of a step."""

    kind: str
    name: str
    state: str
    request: str  # digest of its command
    attachable: bool
    running: bool  # then other work must not take its place
    attach: Callable[[], T]
    clear: Callable[[], None]  # makes room for the next attempt
    how_to_end: str  # a command


def attach_or_start(request: str, *, start: Callable[[], T], find: Callable[[], Found[T] | None]) -> T:
    """Start the work, or attach to what an earlier attempt left, or to what a request whose answer was lost started.

    `start` raises `Conflict` if the name is taken.
    """
    while True:
        with suppress(Conflict):
            return start()
        found = find()
        if found is None:
            continue
        if found.attachable and found.request == request:
            handle = found.attach()
            say(f"attached to {found.kind} {found.name}, which is {found.state}")
            return handle
        if found.running:
            raise UserError(
                found.name,
                f"this {found.kind} runs the same step on other inputs",
                hint=f"wait for it, or end it: {found.how_to_end}",
            )
        found.clear()


def job_name(run: str, step: str, uri: str) -> str:
    """`ncsn-<run>-<step>-<digest>`, a DNS-1035 label of at most 47 characters; the same for every attempt."""
    digest = hashlib.sha256(uri.encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    room = MAX_NAME - len(f"ncsn--{step}-{digest}")
    return f"ncsn-{readable[:room].strip('-')}-{step}-{digest}"


def command_digest(command: tuple[str, ...]) -> str:
    """Distinguishes another attempt at the same work from other work under the same name."""
    return hashlib.sha256("\0".join(command).encode()).hexdigest()[:16]


@contextmanager
def ended_on_sigterm(end: Callable[[], None]) -> Iterator[None]:
    """On SIGTERM call `end` before any cleanup: KFP kills a canceled task after less than a second."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    told = False

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = True
        end()
        sys.exit(TERMINATED)

    before: Any = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except Exception:
        # Python drops the handler's exit if it interrupts a finalizer. Then the end of the job is noticed here.
        if told:
            sys.exit(TERMINATED)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def say(line: str) -> None:
    """Print a line for the person who waits; the log of a KFP task is its stderr."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def message_of(error: Any) -> str:
    """The message in the JSON of a refusal, or its reason, in one line."""
    try:
        message = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = error.reason
    return " ".join(str(message).split())


class Unavailable(ConnectionError):
    """A server that may answer the next request; the message is the reason."""


def keep_asking(call: Callable[[], T], *, server: str, seconds: float) -> T:
    """The result of `call`, repeated while it raises `Unavailable`; a `ConnectionError` after `seconds`."""

    def reason(error: Exception) -> str | None:
        return str(error) if isinstance(error, Unavailable) else None

    try:
        return Retry(server, seconds, reason, say=say)(call)
    except Unavailable as error:
        if not seconds:
            raise ConnectionError(f"{server} does not answer ({error})") from None
        raise ConnectionError(
            f"{server} has not answered for {seconds:g} s ({error}); what runs there continues for a while, and the "
            "same command attaches to it again"
        ) from None
