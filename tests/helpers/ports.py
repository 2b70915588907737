"""Ports for servers that are started a moment later, perhaps again and again."""

from __future__ import annotations

import secrets
import socket
from contextlib import ExitStack, suppress


def free_ports(count: int) -> list[int]:
    """Different ports of loopback on which nothing listens."""
    with ExitStack() as stack:
        taken: list[int] = []
        while len(taken) < count:
            # Below those that Linux gives to other processes, which would take them before a server starts (again).
            one, port = stack.enter_context(socket.socket()), 20_000 + secrets.randbelow(12_000)
            with suppress(OSError):
                one.bind(("127.0.0.1", port))
                taken.append(port)
        return taken


def free_port() -> int:
    return free_ports(1)[0]
