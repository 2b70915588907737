"""A clock that the test moves, so that what waits for a time does not depend on the speed of the machine."""

from __future__ import annotations


class Clock:
    """Stands in for the module `time`: a call of `sleep` moves it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now

    monotonic = perf_counter = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds
