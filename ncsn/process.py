"""This process: its collector of garbage, its memory and its threads."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
from contextlib import suppress

_ALLOCATIONS = 50_000  # new objects until the youngest are searched for cycles; Python's default is 700
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_GIB = 2**30


def _leave() -> None:
    gc.freeze()
    if "triton" in sys.modules:  # its bindings print each object that outlives the interpreter, hundreds of lines
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def reduce_gc() -> None:
    """Collect garbage less often, and not at exit; for a process that is about to import torch or MLflow."""
    # Their imports make half a million objects, none of which is garbage. With Python's defaults the collector
    # searches them for 0.2 s during the imports and for two seconds at exit.
    gc.set_threshold(_ALLOCATIONS, 10, 10)
    atexit.register(_leave)


def settle() -> None:
    """Let operations' threads spin for a shorter time and glibc keep freed memory; for a process that is ncsn's own."""
    # The threads of an operation wait for each other by spinning, for milliseconds. Beside other programs they kept
    # from working whom they waited for: a small network took 100 times as long. Read when torch is loaded.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "2000"
    # On a CPU, training, sampling and evaluation free and allocate the same feature maps again and again. To map and
    # clear them each time took 7 % of the time of training, a third of sampling and half of a classifier's features.
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _GIB)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
