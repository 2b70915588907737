"""Connections on uvicorn as Ray Serve starts it: late and large requests, silent clients, names of hosts."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from ncsn.serving import connections

ASK = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
DROPS = [b"a"] * 200


POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
LARGE = 20_000_000


async def slow(scope: Scope, receive: Receive, send: Send) -> None:
    await Request(scope, receive).body()
    await asyncio.sleep(2)
    await PlainTextResponse("made")(scope, receive, send)


async def told(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    names = [name.decode() for name, _ in scope["headers"]]
    await JSONResponse([names, len(body)])(scope, receive, send)


async def large(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("a" * LARGE)(scope, receive, send)


@contextmanager
def serving(host: str, *, seconds: int, app: ASGIApp = slow) -> Iterator[Callable[[], socket.socket]]:
    """What connects to a server whose clients have so long for a head, on loopback whatever its `host` is."""
    with (
        pytest.MonkeyPatch.context() as patch,
        socket.create_server(("127.0.0.1", 0)) as listening,
        ExitStack() as stack,
    ):
        patch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
        assert connections.limit() == []
        config = uvicorn.Config(app, host=host, timeout_keep_alive=seconds, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(listening.getsockname(), timeout=60))

        try:
            yield connect
        finally:
            server.should_exit = True
            stack.close()
            thread.join(60)
            assert not thread.is_alive()


def answer(connection: socket.socket, *sent: bytes, pause: float = 0.0) -> bytes:
    """The status that is answered to this; empty for a connection that is closed without one."""
    try:
        for each in sent:
            connection.sendall(each)
            time.sleep(pause)
        return connection.recv(1000).partition(b" ")[2][:3]
    except ConnectionError:
        return b""


def test_a_late_request_closes_the_connection_and_a_late_answer_does_not() -> None:
    with serving("127.0.0.1", seconds=1) as connect:
        assert answer(connect()) == b""
        for start, rest in ((ASK + b"X-A: ", DROPS), (POST, DROPS), (CHUNKED, [b"1\r\na\r\n"] * 200)):
            assert answer(connect(), start, *rest, pause=0.1) == b""
        used = connect()
        assert answer(used, ASK, b"\r\n") == b"200"
        assert answer(used, ASK + b"X-A: ", *DROPS, pause=0.1) == b""


def test_a_head_of_a_megabyte_is_refused() -> None:
    with serving("127.0.0.1", seconds=60) as connect:
        assert answer(connect(), ASK, b"X-A: " + b"a" * 10_000, b"\r\n\r\n") == b"200"
        large = (b"X-A: " + b"a" * 1_000_000, b"X-A: a\r\n" * 200_000)
        assert {answer(connect(), ASK, each, b"\r\n\r\n") for each in large} <= {b"400", b""}


@pytest.mark.parametrize(("sent", "rest"), [(b"", ASK + b"\r\n"), (POST, b"a" * 300)])
def test_silent_clients_keep_nobody_out(sent: bytes, rest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_WAITING", 5)
    with serving("127.0.0.1", seconds=3600) as connect:
        silent = list[socket.socket]()
        for _ in range(9):
            silent.append(connect())
            silent[-1].sendall(sent)
        assert answer(connect(), ASK + b"\r\n") == b"200"
        assert [answer(each) for each in silent[:4]] == [b""] * 4
        assert answer(silent[-1], rest) == b"200"


def test_who_comes_when_all_others_are_being_answered_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 5)
    with serving("127.0.0.1", seconds=60) as connect:
        asking = [connect() for _ in range(6)]
        for each in asking:
            each.sendall(ASK + b"\r\n")
        assert sorted(answer(each) for each in asking) == [b"200"] * 4 + [b"503"] * 2


def test_a_body_comes_whole_or_not_at_all_and_a_client_sets_no_rules_of_ray_serve() -> None:
    with serving("127.0.0.1", seconds=60, app=told) as connect:
        asking = connect()
        rules = b"X-Request-Disconnect-Disabled: ?1\r\nX-Session-Id: 1\r\n"
        asking.sendall(POST.replace(b"\r\n\r\n", b"\r\n" + rules + b"Content-Type: a/b\r\n\r\n"))
        for _ in range(300):
            asking.sendall(b"a")
        assert asking.recv(1000).endswith(b'[["host","content-type"],300]')
        for most, status in ((65_536, b"200"), (65_537, b"413")):
            assert answer(connect(), POST.replace(b"300", b"%d" % most), b"a" * most) == status


def test_who_asks_on_and_takes_no_answer_is_left() -> None:
    with serving("127.0.0.1", seconds=1, app=large) as connect:
        asking, taken = connect(), 0
        asking.sendall((ASK + b"\r\n") * 3)
        time.sleep(3)
        with suppress(ConnectionError):
            while data := asking.recv(1 << 20):
                taken += len(data)
        assert taken < LARGE


@pytest.mark.parametrize(
    ("host", "statuses"),
    [("127.0.0.1", [b"400", b"400", b"400", b"200", b"200"]), ("0.0.0.0", [b"200"] * 5)],
)
def test_a_server_on_loopback_has_the_names_of_loopback_only(host: str, statuses: list[bytes]) -> None:
    names = (
        b"evil.example",
        b"127.0.0.1.evil.example:8000",
        b"localhost.evil.example",
        b"localhost:8000",
        b"127.0.0.1",
    )
    with serving(host, seconds=60) as connect:
        asked = [(connect(), b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % name) for name in names]
        for connection, head in asked:
            connection.sendall(head)
        assert [answer(connection) for connection, _ in asked] == statuses
