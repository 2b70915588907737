"""A backend runs a step's command on other machines and returns when it has ended.

The command is the `ncsn <step>` that a person types, with the local backend. Config, result, progress and errors go
through the store, so a backend carries only the command.

A new one is a class with the methods of `Backend`, a branch of `ncsn.remote.open_backend`, a name in
`ncsn.environment.BackendName`, and a section of its settings in `ncsn.config.compute`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol, Self, TypeVar

from ncsn import storage
from ncsn.environment import KFP_RUN_ID
from ncsn.errors import UserError
from ncsn.progress import say
from ncsn.runs.layout import RunFolder, said_newest
from ncsn.runs.record import ForeignRun, StepError, read_attempt
from ncsn.runs.results import TrainResult
from ncsn.storage.heartbeat import Heartbeat
from ncsn.storage.retry import Retry, unavailable

MAX_NAME = 47  # KubeRay adds up to 6 characters to a RayJob's name, and a name has at most 53
CHECK_SECONDS = 5.0  # a person waits for `ncsn doctor`
PATIENCE_SECONDS = 900.0  # a head node or an API server is replaced within this time

# They join the steps to an MLflow run that KFP opened. Addresses and names; a token is in the Secret of the Ray pods.
_FORWARDED = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_WORKSPACE",
    "MLFLOW_TRACKING_AUTH",
    KFP_RUN_ID,
)
_LOOPBACK = re.compile(r"https?://(localhost|127(\.\d+){3}|\[::1\])(:|/|$)")

_LOG_SECONDS = 2.0  # between the first two looks at a driver's log; later five times as long
_LAST_READ_SECONDS = 15.0
_SAID = "error: "
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_HARMLESS = re.compile(r"GetTimeoutError|PlacementGroupCleaner")  # Ray prints these on a busy node and recovers
TRACEBACK = "Traceback (most recent call last)"
# Ray puts the process before a worker's line: "(RayTrainWorker pid=7, ip=10.0.0.2) ValueError: ...".
_ERROR = re.compile(
    r"^(?:\([^)]*\)\s*)?((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Expired|Exit|NotFound)(?:: .*)?)$"
)

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteStep:
    """One step to run elsewhere."""

    root: str  # of the store
    run: str
    step: str
    command: tuple[str, ...]  # decides whether an attempt can attach; `leased_command` is what runs
    code: str | None = None  # URI of an archive of the packages to run, in place of those that are installed there
    facts: Mapping[str, str] = field(default_factory=dict)  # shown with the job, such as the name of its MLflow run

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.root, self.run)

    @property
    def uri(self) -> str:
        """The step's folder in the store, which holds its record, its log and the launchers' leases."""
        return storage.join(self.folder.steps, self.step)

    @property
    def lease(self) -> str:
        """The folder where the backend renews its lease with a `Heartbeat` while it waits for the step.

        Its name tells the driver its request.
        """
        return storage.join(self.uri, "lease", self.request)

    @property
    def log(self) -> str:
        return storage.join(self.uri, "log.txt")

    @property
    def leased_command(self) -> tuple[str, ...]:
        """The command to run. Without its lease, the step would be refused: this process has locked it."""
        return (*self.command, "--lease", self.lease)

    @property
    def job_name(self) -> str:
        """`ncsn-<run>-<step>-<digest>`, a DNS-1035 label of at most 47 characters; the same for every attempt."""
        digest = hashlib.sha256(self.uri.encode()).hexdigest()[:8]
        readable = re.sub(r"[^a-z0-9]+", "-", self.run.lower()).strip("-")
        room = MAX_NAME - len(f"ncsn--{self.step}-{digest}")
        return f"ncsn-{readable[:room].strip('-')}-{self.step}-{digest}"

    def told(self) -> StepError | None:
        """Why the step failed, as its driver has recorded it."""
        record = read_attempt(self.folder, self.step)
        return record.error if (record.state, record.request) == ("FAILED", self.request) else None

    def resumes(self) -> str:
        """What the next driver of the step does after the loss of one, as a clause."""
        if self.step != TrainResult.step:
            return f"the step {self.step} goes on with what is stored"
        return f"training resumes from {said_newest(self.folder.checkpoints)}"

    @property
    def request(self) -> str:
        """Tells another attempt at the same work from other work under the same name."""
        return hashlib.sha256("\0".join(self.command).encode()).hexdigest()[:16]


class RemoteFailure(RuntimeError):
    """The step failed elsewhere; the message is one line with the reason."""


class RemoteLost(RemoteFailure):
    """The backend no longer knows the step; if it ended well, its result is in the store."""


class EndedByOther(RemoteLost):
    """The launcher that had started the job ended it; this one had attached to it, and may start it again."""


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

    def execute(self, step: RemoteStep, accepted: Callable[[], None]) -> None:
        """Run `step.leased_command` to its end, or attach to it if it is running; `accepted` is called in between.

        Ctrl-C, and SIGTERM unless another attempt will follow, must end the work there if `is_ours`. Until then the
        backend renews its lease in `step.lease`: when all there are stale, the step saves and ends.

        Raises:
            RemoteFailure: It failed.
            RemoteLost: The backend no longer knows it.
            EndedByOther: Another launcher ended it.
            ForeignRun: A job of its name does other work. `accepted` was not called.
        """

    def stop(self, *, run: str | None, kfp_run: str | None) -> list[str]:
        """Stop the running jobs of a run, or of a run of KFP; their names."""

    def checks(self) -> Iterator[Check]:
        """What the backend needs."""


def is_ours(heart: Heartbeat, kfp_run: str | None, this_run: str | None) -> bool:
    """Whether a job ends with this launcher; without asking anybody, as a signal handler needs.

    The pipeline run decides. Without one, a launcher's job is what no other launcher waits for, whoever made it.
    """
    return kfp_run == this_run if kfp_run or this_run else heart.alone


def refuse_other_work(name: str, how_to_end: str) -> ForeignRun:
    """The error for a running job of the step's name that is not the step's."""
    reason = "this job runs the same step on other inputs"
    return ForeignRun(name, reason, hint=f"wait for it, or end it: {how_to_end}")


def forwarded_environment(*, to_pods: bool = False) -> dict[str, str]:
    """Variables of this process that the job needs, without an address that contains a password.

    Pods have a ConfigMap, and get no address of this machine, such as a port-forward's.
    """
    values = {name: os.environ[name] for name in _FORWARDED if os.environ.get(name)}
    return {
        name: value for name, value in values.items() if "@" not in value and not (to_pods and _LOOPBACK.match(value))
    }


def message_of(error: Any) -> str:
    """The message in the JSON of a refusal, or its reason, in one line."""
    try:
        message = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = error.reason
    return " ".join(str(message).split())


def keep_asking(call: Callable[[], T], *, server: str, seconds: float) -> T:
    """The result of `call`, repeated while the server is unavailable; a `ConnectionError` after `seconds`."""
    try:
        return Retry(server, seconds, say=say)(call)
    except Exception as error:
        reason = unavailable(error)
        if reason is None:
            raise
        raise ConnectionError(
            f"{server} has not answered for {seconds:g} s ({reason}); what runs there continues for a while, and the "
            "same command attaches to it again"
        ) from None


def first_error(lines: Iterable[str]) -> str | None:
    """The exception of the first traceback; without one, the last error that `ncsn` printed.

    The first is the failed worker's: later ones are its consequences.
    """
    in_traceback, said = False, None
    for line in (_COLOR.sub("", line) for line in lines):
        if _HARMLESS.search(line):
            in_traceback = False
        elif TRACEBACK in line:
            in_traceback = True
        elif in_traceback and (match := _ERROR.match(line.strip())):
            return match[1]
        elif line.startswith(_SAID):
            said = line.removeprefix(_SAID)
    return said


class DriverLog(ABC):
    """A context that shows the log of a step's driver as it grows, and in the end publishes it at `uri`.

    A process that is told to end has no time for that. The outcome of the job is never read from here.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.lines: list[str] = []
        # An item in `due`: read at once. A signal may interrupt the putting, of which an Event would stay locked.
        self.due, self._job_over = SimpleQueue[None](), False
        self._thread = threading.Thread(target=self._follow, name="driver-log", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        self._job_over = True
        self.due.put(None)
        if kind is not None and not issubclass(kind, Exception):
            return
        self._thread.join(_LAST_READ_SECONDS)
        if self.lines:
            # An error in the block says more than a store that is away.
            with suppress(*(() if kind is None else (OSError,))):
                storage.write_text(self.uri, "\n".join([*self.lines, ""]))

    def describe(self, *causes: str | None) -> str:
        """The causes, and where the log is, if it says anything."""
        return "; ".join(filter(None, (*dict.fromkeys(causes), f"log {self.uri}" if self.lines else None)))

    @abstractmethod
    def read(self, *, over: bool) -> Iterable[str]:
        """The lines since the last call; `over`: there will be no more."""

    def _follow(self) -> None:
        over, pause = False, _LOG_SECONDS
        while not over:
            with suppress(Empty):
                self.due.get(timeout=pause)
            over = self._job_over  # asked before reading, so that the last read sees the whole log
            pause = min(1.2 * pause, 5 * _LOG_SECONDS)
            try:
                for line in self.read(over=over):
                    self.lines.append(line)
                    say(line, of_driver=True)
            except PermissionError as error:
                say(f"the log cannot be shown: {error}")
                return
            except (OSError, RuntimeError, UserError):  # it has not started yet, or the server is away
                continue
