"""Everything that runs on Ray. The only package that imports it."""

from __future__ import annotations

import os
import sys


def _prepare_environment() -> None:
    """Settings that Ray reads when it is imported, for a cluster that this process may start.

    Listening on loopback only has no other switch, and that clients show a token is decided then too. Variables that
    stand already are the user's and stay.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")


if "ray" not in sys.modules:
    if "RAY_ADDRESS" not in os.environ:
        _prepare_environment()
    elif {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default does not send a token that is there
