"""The log of a RayJob's driver, followed from the submitter's pod and kept in the store."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType

import urllib3

from ncsn import storage
from ncsn.cluster.api import KubernetesApi
from ncsn.cluster.backend import say

_PAUSES = (1.0, 5.0)
_LAST_READ_SECONDS = 15.0
_OVERLAP_SECONDS = 10
_SAID = "error: "
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# What Ray prints of itself on a busy node, and gets over.
_HARMLESS = re.compile(r"GetTimeoutError|PlacementGroupCleaner")
_TRACEBACK = "Traceback (most recent call last)"
# Ray puts the process before a worker's line: "(RayTrainWorker pid=7, ip=10.0.0.2) ValueError: ...".
_ERROR = re.compile(
    r"^(?:\([^)]*\)\s*)?((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Expired|Exit)(?:: .*)?)$"
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


class DriverLog:
    """A context that shows the log as it comes and publishes it at `uri` in the end.

    The API server may cut the stream at any time, and a new cluster means a new pod. So it connects again and again
    and drops what it has shown, by the time of each line. The outcome of the job is never read from here.
    """

    def __init__(self, api: KubernetesApi, job: str, *, uri: str) -> None:
        self._api, self._job, self.uri = api, job, uri
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - __exit__ closes it
        self._last_time, self._last_read = b"", time.monotonic()
        self._job_over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow_all, name="driver-log", daemon=True)

    def __enter__(self) -> DriverLog:
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
        self._job_over.set()
        self._thread.join(_LAST_READ_SECONDS)
        with self._lock:
            self._file.seek(0)
            content = self._file.read()
        if content:
            storage.write_bytes(self.uri, content)

    def lines(self) -> Iterator[str]:
        """What came so far."""
        with self._lock:
            self._file.seek(0)
            content = self._file.read()
        yield from content.decode(errors="replace").splitlines()

    def _follow_all(self) -> None:
        pause = _PAUSES[0]
        while True:
            # Asked before reading, so that all that was written until the job was over is read.
            over = self._job_over.is_set()
            try:
                news = self._follow_latest_pod()
            except PermissionError as error:
                say(f"the log cannot be shown: {error}")
                return
            except (ValueError, ConnectionError, urllib3.exceptions.HTTPError):  # not started yet, or cut
                news = True
            if over:
                return
            pause = _PAUSES[0] if news else min(2 * pause, _PAUSES[1])
            self._job_over.wait(pause)

    def _follow_latest_pod(self) -> bool:
        """Follow the log until it ends; whether it had lines that are new."""
        pods = self._api.pods(f"job-name={self._job}")
        if not pods:
            return False
        before = self._last_time
        silent = time.monotonic() - self._last_read
        since = round(silent) + _OVERLAP_SECONDS if before else None
        rest = b""
        with self._api.follow_log(pods[-1]["metadata"]["name"], since_seconds=since) as pieces:
            for piece in pieces:
                *complete, rest = (rest + piece).split(b"\n")
                for line in complete:
                    self._take(line)
        return self._last_time != before

    def _take(self, line: bytes) -> None:
        at, _, text = line.partition(b" ")
        if at <= self._last_time:
            return
        self._last_time, self._last_read = at, time.monotonic()
        with self._lock:
            if not self._file.closed:
                self._file.seek(0, 2)
                self._file.write(text + b"\n")
        say(text.decode(errors="replace"))
