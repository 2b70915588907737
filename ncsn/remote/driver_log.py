"""The log of a step's driver: shown while it grows, kept in the store, and searched for the cause of a failure."""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Self

from ncsn import storage
from ncsn.remote.backend import say

_PAUSES = (1.0, 5.0)
_LAST_READ_SECONDS = 15.0
_SAID = "error: "
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_HARMLESS = re.compile(r"GetTimeoutError|PlacementGroupCleaner")  # Ray prints these on a busy node and recovers
_TRACEBACK = "Traceback (most recent call last)"
# Ray puts the process before a worker's line: "(RayTrainWorker pid=7, ip=10.0.0.2) ValueError: ...".
_ERROR = re.compile(
    r"^(?:\([^)]*\)\s*)?((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Expired|Exit|NotFound)(?:: .*)?)$"
)


def first_error(lines: Iterable[str]) -> str | None:
    """The exception of the first traceback; without one, the last error that `ncsn` printed.

    The first is the failed worker's: later ones are its consequences.
    """
    in_traceback, said = False, None
    for line in (_COLOR.sub("", line) for line in lines):
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
    """A context that shows the log as it grows; `finish` publishes it at `uri`.

    A stream may be cut at any time, so it is opened again and again. The outcome of the job is never read from here.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.lines: list[str] = []
        self._job_over = threading.Event()
        self._thread = threading.Thread(target=self._follow_all, name="driver-log", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._job_over.set()

    def finish(self) -> None:
        """Read the rest and publish all of it."""
        self._job_over.set()
        self._thread.join(_LAST_READ_SECONDS)
        if self.lines:
            storage.write_text(self.uri, "\n".join([*self.lines, ""]))

    @abstractmethod
    def follow(self) -> bool:
        """Take new lines until the stream ends; whether there were any.

        Raises:
            PermissionError: The log may not be read.
            ConnectionError: The stream has not started, or was cut.
        """

    def take(self, line: str) -> None:
        """Show one line and keep it."""
        self.lines.append(line)
        say(line)

    def _follow_all(self) -> None:
        pause = _PAUSES[0]
        while True:
            over = self._job_over.is_set()  # asked before reading, so that the last read sees the whole log
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
