"""Rows of the benchmark table, and timing of candidates in turns, so that all see the same load of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

Clock = Callable[[], float]
TIMES = "x"  # unit of a ratio


@dataclass(frozen=True)
class Row:
    """One measured number and its target."""

    part: str
    measure: str
    value: float
    unit: str = TIMES
    target: float | None = None
    higher_is_better: bool = True
    detail: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the value reaches the target; None without a target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.higher_is_better else self.value <= self.target

    def to_json(self) -> dict[str, Any]:
        """All fields, and `reached`."""
        return asdict(self) | {"reached": self.reached}


def in_turns(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round after a warm-up; a candidate that returns a float timed itself."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            began = clock()
            own = call()
            seconds[name].append(own if isinstance(own, float) else clock() - began)
    return seconds


@contextmanager
def own_process(
    prepare: Callable[..., Callable[[], object]], *args: object, clock: Clock = time.perf_counter
) -> Iterator[Callable[[], float]]:
    """A call of the function that `prepare(*args)` returns, in a separate process; it returns its seconds.

    With the clock `time.process_time` they are CPU seconds, which for one thread do not depend on other load.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_keep, initargs=(partial(prepare, *args),)) as pool:
        yield lambda: pool.submit(_call, clock).result()


_kept: list[Callable[[], object]] = []


def _keep(prepare: Callable[[], Callable[[], object]]) -> None:
    _kept.append(prepare())


def _call(clock: Clock) -> float:
    began = clock()
    _kept[0]()
    return clock() - began


def ratio(measured: Mapping[str, list[float]], one: str, other: str) -> float:
    """One over the other: the median over the rounds of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(measured[one], measured[other], strict=True))


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| part | measure | figure | reach | |", "|---|---|---:|---:|---|"]
    for row in rows:
        sign = ("≥ " if row.higher_is_better else "≤ ") if row.target is not None else ""
        reach = f"{sign}{_shown(row.target, row.unit)}" if row.target is not None else ""
        mark = {True: "reached", False: "**missed**", None: ""}[row.reached]
        tail = f"{mark}{'; ' if mark and row.detail else ''}{row.detail}"
        lines.append(f"| {row.part} | {row.measure} | {_shown(row.value, row.unit)} | {reach} | {tail} |")
    return "\n".join(lines)


def _shown(value: float, unit: str) -> str:
    number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{number}{unit}" if unit in ("%", TIMES) else f"{number} {unit}"
