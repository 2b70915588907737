"""A receiver of events: a real HTTP server on loopback that fails as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from answering import answering

from ncsn import events

CUT = 0  # the connection breaks off without an answer


@dataclass
class Receiver:
    """What has come, and what is answered."""

    url: str = ""
    answers: list[int] = field(default_factory=list)  # HTTP statuses of the next requests; afterwards 200
    tries: list[tuple[dict[str, str], str]] = field(default_factory=list)  # headers, in lower case, and body
    taken: list[dict[str, Any]] = field(default_factory=list)  # events that were answered with 200
    answering: threading.Event = field(default_factory=threading.Event)  # it keeps requests waiting while it is cleared
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def wait_for(self, count: int) -> list[dict[str, Any]]:
        """The events once so many were taken."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.taken) >= count, timeout=60), self.taken
        return self.taken


@contextmanager
def receiver() -> Iterator[Receiver]:
    """A receiver to which this process and its children send while the context is open."""
    found = Receiver()
    found.answering.set()

    def answer(asked: BaseHTTPRequestHandler, content: bytes) -> tuple[int, bytes] | None:
        body = content.decode()
        found.answering.wait(60)
        with found.arrived:
            found.tries.append(({name.lower(): value for name, value in asked.headers.items()}, body))
            status = found.answers.pop(0) if found.answers else 200
            if status == 200:
                found.taken.append(json.loads(body))
            found.arrived.notify_all()
        return None if status == CUT else (status, b"")

    with answering(answer) as url, pytest.MonkeyPatch.context() as patch:
        found.url = f"{url}/hidden/path"
        patch.setenv(events.WEBHOOK, found.url)
        patch.setenv(events.SECRET, "of the test")
        try:
            yield found
        finally:
            found.answering.set()
