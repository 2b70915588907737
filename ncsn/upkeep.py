"""Python's search for garbage, kept out of the way of processes that live for one command."""

from __future__ import annotations

import atexit
import gc
import sys

_ALLOCATIONS = 50_000
"""New objects after which Python looks for cycles among the youngest; its own choice is 700."""


def collect_seldom() -> None:
    """Call before the heavy imports: torch and MLflow make half a million objects, and none of them is garbage.

    With Python's settings it looks through them again and again while they are made, for 0.2 s, and at the end three
    times, for a second.
    """
    gc.set_threshold(_ALLOCATIONS, 10, 10)
    atexit.register(_skip_the_last_collections)


def _skip_the_last_collections() -> None:
    # Triton's bindings print every object that outlives the interpreter, hundreds of lines, so they are collected.
    if "triton" not in sys.modules:
        gc.freeze()
