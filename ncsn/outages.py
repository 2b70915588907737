"""Servers that a rehearsal has taken away, for every process of a node that carries the variable.

A fault (`ncsn.faults`) declares an outage; the one place that speaks to the server asks `refuse` before each call.
Without the variable that costs one look into the environment.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Literal

VARIABLE = "NCSN_OUTAGES"
"""Names the folder of the declared outages; set by a rehearsal for what it starts."""

Server = Literal["store", "tracking"]


def declare(server: Server, *, seconds: float, share: float = 1.0) -> None:
    """Take `server` away from now on for `seconds`; `share` is the part of the calls that fail."""
    path = Path(os.environ[VARIABLE]) / server
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{server}.{os.getpid()}")
    temporary.write_text(json.dumps({"until": time.time() + seconds, "share": share}))
    temporary.replace(path)


def inherited() -> dict[str, str]:
    """The variable, for processes that do not inherit the environment of this one."""
    return {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}


def refuse(server: Server) -> None:
    """Return, unless a rehearsal has taken the server away.

    Raises:
        ConnectionRefusedError: if it has.
    """
    folder = os.environ.get(VARIABLE)
    if folder is None:
        return
    try:
        outage = json.loads((Path(folder) / server).read_text())
    except FileNotFoundError:
        return
    left = outage["until"] - time.time()
    if left > 0 and random.random() < outage["share"]:  # noqa: S311 - no secret depends on it
        raise ConnectionRefusedError(f"rehearsal: the {server} server is away for {left:.0f} s more")
