"""The cache on this node's disk."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_DIR_VARIABLE = "NCSN_CACHE_DIR"
DEFAULT_CACHE_DIR = "~/.cache/ncsn"


def cache_folder() -> Path:
    """This node's folder for what can be made again: `NCSN_CACHE_DIR`, else `~/.cache/ncsn`."""
    return Path(os.environ.get(CACHE_DIR_VARIABLE) or DEFAULT_CACHE_DIR).expanduser()
