"""A worker that hangs ends itself, so that training starts again from its last checkpoint."""

from __future__ import annotations

import faulthandler
import logging
import math
import sys
import threading
import traceback

from ncsn import storage
from ncsn.storage.retry import RETRY, limited
from ncsn.training.context import WorkerContext

STEP_SECONDS = 120.0  # that a step may take in any case
SLOWER = 10  # times as long as before it may take too
LONG_SECONDS = 1800.0  # where it compiles, or waits for the store; also torch's default limit of a collective operation
TICK_SECONDS = 1.0
END_SECONDS = 10.0  # in which each worker leaves its stacks: they fail when the first one ends

_logger = logging.getLogger(__name__)


class Watchdog:
    """A thread that ends this process if its training comes no further, where `context.hung` says so.

    Its clock are its own ticks: it stands still while the process is stopped or the machine is suspended, and while
    another thread keeps Python's lock, which none does that waits for a device, a worker or a file.
    """

    # The others wait for the worker that hangs, so all of them end; whose stack differs from the others' is the one.

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        # Nobody knows how long the first step takes on a CPU, where a large batch may be an hour's work.
        self._limit = LONG_SECONDS if context.device.type == "cuda" else math.inf
        self._now = self._since = self._usual = 0.0  # seconds; the last decays, because the first step is slow
        self._ended, self._ending, self._fired = threading.Event(), threading.Lock(), False

    def start(self) -> None:
        """Begin to watch."""
        if self._context.hung is not None:
            threading.Thread(target=self._watch, args=[self._context.hung], name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """What follows may take any time, in this process too."""
        with self._ending:
            self._ended.set()
            if self._fired:
                faulthandler.cancel_dump_traceback_later()

    def stepped(self) -> None:
        """All workers have come this far, on their devices too."""
        self._usual /= 2
        self._allow(STEP_SECONDS)

    def expect_long(self) -> None:
        """Until `stepped`, this worker or one that it waits for may do more than steps. To be called by all."""
        self._allow(LONG_SECONDS)

    def _allow(self, least: float) -> None:
        self._usual = max(self._now - self._since, self._usual)
        self._since, self._limit = self._now, max(least, SLOWER * self._usual)

    def _watch(self, folder: str) -> None:
        while self._now - self._since <= self._limit:
            if self._ended.wait(TICK_SECONDS):
                return
            self._now += TICK_SECONDS
        with self._ending:
            if self._ended.is_set():
                return
            self._fired = True
            faulthandler.dump_traceback_later(END_SECONDS, exit=True, file=2)  # whatever becomes of the following
        rank, idle = self._context.rank, self._now - self._since
        _logger.warning("%sworker %d made no step for %.0f s; the workers' stacks are in %s", RETRY, rank, idle, folder)
        frames, lines = sys._current_frames(), list[str]()
        for thread in threading.enumerate():
            if thread.ident in frames:
                lines += [f"{thread.name}:\n", *traceback.format_stack(frames[thread.ident]), "\n"]
        with limited(0):
            storage.write_text(storage.join(folder, f"worker-{rank}.txt"), "".join(lines))
