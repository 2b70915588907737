"""Connections of Ray Serve's proxy: how much, how slowly and under which name a client may ask."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.middleware.trustedhost import TrustedHostMiddleware
from uvicorn.config import HTTP_PROTOCOLS, Config
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # from a connection's first moment, or from the end of an answer, to the next request's last header
MOST_CONNECTIONS = 2000


class Connection(H11Protocol):
    """Is closed when a request's head is late or has more than 64 KB (h11's bound); the body is the application's care.

    Beyond `MOST_CONNECTIONS` the one that has waited for a head for the longest time is closed.
    """

    def __init__(self, config: Config, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.ws_protocol_class = None  # a websocket would be beyond these limits
        self._late: asyncio.TimerHandle | None = None
        if config.host == "127.0.0.1":
            # The name of another page's server may have become this address: a browser would let it read the answers.
            hosts = [config.host, "localhost"]
            self.app = TrustedHostMiddleware(self.app, allowed_hosts=hosts, www_redirect=False)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            ours = (each for each in self.connections if isinstance(each, Connection))
            waiting = {each: each._late.when() for each in ours if each._late}
            if waiting:
                min(waiting, key=waiting.__getitem__).transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        if not getattr(self.cycle, "response_complete", True):  # before the first request there is no cycle
            self._unwatch()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def limit() -> list[Any]:
    """Make the connections of this process's servers `Connection`s: a callback of Ray Serve, without a middleware."""
    # Of uvicorn's settings Ray Serve 2.60 hands on the time between two requests only.
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{Connection.__name__}"
    return []
