"""How a process of `ncsn` answers SIGTERM and Ctrl-C: by one handler, whose state says what comes first.

    idle       SIGTERM raises SystemExit, Ctrl-C KeyboardInterrupt: `finally` blocks end what this process has started.
    saving     A training works here: the first signal asks it to save, for at most ten seconds; then as idle. A second
               signal is answered as if idle.
    waiting    A job works elsewhere: SIGTERM ends it first, since KFP kills a canceled task after less than a second.

Under Slurm every process of the group gets the signal: Ray's own end with their driver. Ray installs an answer of its
own while it connects; `ncsn.distributed.cluster` restores this one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit codes
SAVE_SECONDS = 10.0
END_SECONDS = 20.0  # at most from the last line of a command that was told to end until it has


class Answer:
    """The handler and its state. There is one, `answer`; in a process that is not ncsn's own it is not installed."""

    def __init__(self) -> None:
        self.told: int | None = None  # the first signal
        self._installed = False
        self._save: Callable[[], object] | None = None  # saving: asks the training to save; False if it has not begun
        self._end: Callable[[], object] | None = None  # waiting: ends the job

    @property
    def code(self) -> int:
        """The exit code after a signal, whatever Ray makes of it: of any code, a wait for Ray makes 1."""
        return TERMINATED if self.told == signal.SIGTERM else INTERRUPTED

    def install(self) -> None:
        """Answer from now on, in a process of ncsn's own."""
        self.told, self._installed = None, True
        signal.signal(signal.SIGTERM, self._handle)
        if callable(signal.getsignal(signal.SIGINT)):  # a shell's background job ignores Ctrl-C
            signal.signal(signal.SIGINT, self._handle)

    @contextmanager
    def saving(self, ask: Callable[[], bool]) -> Iterator[None]:
        """While a training works in the block, a first signal calls `ask`: False if there is nothing to save yet."""
        if not self._installed:
            yield
            return
        ended = threading.Event()

        def save() -> None:
            if not (ask() and ended.wait(SAVE_SECONDS)) and self.told:
                signal.pthread_kill(threading.main_thread().ident or 0, self.told)

        self._save = save
        try:
            yield
        finally:
            self._save = None
            ended.set()
            if self.told:
                self._stop(self.told)

    @contextmanager
    def waiting(self, end: Callable[[], object]) -> Iterator[None]:
        """While a job works elsewhere, SIGTERM calls `end` first; also in a process that has not installed this."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: Any = signal.getsignal(signal.SIGTERM)
        self._end = end
        signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        finally:
            self._end = None
            signal.signal(signal.SIGTERM, before)

    def leave(self) -> None:
        """After a signal, end the process in spite of a lock that the signal left taken.

        urllib3 closes its pools of connections at exit, and would wait for the lock of one forever.
        """
        if self.told:
            with suppress(OSError):
                sys.stdout.flush()
            late = threading.Timer(END_SECONDS, os._exit, (self.code,))
            late.daemon = True
            late.start()

    def _handle(self, number: int, _frame: object) -> None:
        first, self.told = self.told is None, self.told or number
        if self._save and first:
            # In a thread, since the store's client may be what the signal interrupts.
            threading.Thread(target=self._save, daemon=True).start()
            return
        if self._end and number == signal.SIGTERM:
            self._end()
        self._stop(number)

    def _stop(self, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(TERMINATED)


answer = Answer()
