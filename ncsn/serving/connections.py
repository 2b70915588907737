"""Connections of Ray Serve's proxy: how much, how slowly and under which name a client may ask."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from functools import partial
from typing import Any, ClassVar

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS, Config
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 4000  # For each that has asked, Ray takes 200 KB in each of two processes.
MOST_WAITING = 1000  # of them for their clients
MOST_BYTES = 65536  # of a body, and of what uvicorn has not taken from a connection
_ON_LOOPBACK = ("127.0.0.1", "localhost")
_HEADERS = (b"content-type", b"host")  # that the application reads; by others Ray Serve lets a client change its rules


class Connection(H11Protocol):
    """Is aborted if a request is not there whole `keep_alive_timeout_s` after its start or after the last answer.

    uvicorn forgets that time at the first byte. In it the answer is taken, too. Of more than `MOST_WAITING` that wait
    for their clients the oldest is aborted, so that many slow ones do not keep out others. h11 refuses a head of more
    than 16 KB that comes in parts.
    """

    _waiting: ClassVar[dict[Connection, TimerHandle]] = {}  # the oldest first

    def __init__(self, config: Config, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.ws_protocol_class = None  # websockets would have other limits
        self.limit_concurrency = MOST_CONNECTIONS  # the next ones get 503
        self.app = partial(_ask_when_whole, self.app)
        if config.host in _ON_LOOPBACK:
            # The name of another page's server may have become this address: a browser would let it read the answers.
            self.app = TrustedHostMiddleware(self.app, allowed_hosts=_ON_LOOPBACK, www_redirect=False)

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if len(self.conn._receive_buffer) > MOST_BYTES:  # of requests before the last one was answered
            self.transport.abort()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_waiting()

    def _watch(self) -> None:
        asked, taken = self.cycle, not self.flow.write_paused
        if asked is not None and taken and not asked.more_body and not asked.response_complete:  # type: ignore[redundant-expr]
            self._end_waiting()
        elif self not in self._waiting:
            self._waiting[self] = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)
            if len(self._waiting) > MOST_WAITING:
                oldest = next(iter(self._waiting))
                oldest._end_waiting()
                oldest.transport.abort()

    def _end_waiting(self) -> None:
        if timer := self._waiting.pop(self, None):
            timer.cancel()


async def _ask_when_whole(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Let Ray Serve have a request with its body only, since it has room for so many."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
        if len(body) > MOST_BYTES:
            await PlainTextResponse(f"a request has at most {MOST_BYTES:,} bytes\n", 413)(scope, receive, send)
            return
    whole = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_whole() -> Message:
        return whole.pop() if whole else await receive()

    headers = [each for each in scope["headers"] if each[0] in _HEADERS]
    await app({**scope, "headers": headers}, receive_whole, send)


def limit() -> list[Any]:
    """Make the connections of this process's servers `Connection`s: a callback of Ray Serve, without a middleware."""
    # Of uvicorn's settings Ray Serve 2.60 hands on the time between two requests only.
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{Connection.__name__}"
    return []
