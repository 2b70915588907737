"""How this process gets its memory from the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_GIB = 2**30


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation instead of giving it back to the system.

    Training, sampling and evaluation on a CPU free and take the same feature maps again and again; each time the system
    had to map and clear them anew, which took 7 % of the time of a training, a third of that of sampling and half of
    that of a classifier's features. A process without glibc is left as it is.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _GIB)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
