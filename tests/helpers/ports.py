"""Ports for servers that are started a moment later, perhaps again and again, and a connection that can be cut."""

from __future__ import annotations

import secrets
import socket
import threading
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit


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


class TcpProxy:
    """A proxy on the way to a server, as a context. While it is cut, connections are reset and new ones closed."""

    def __init__(self, url: str) -> None:
        self._server = (urlsplit(url).hostname, urlsplit(url).port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._is_cut, self._lock = False, threading.Lock()

    def __enter__(self) -> TcpProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        with self._lock:
            self._is_cut = True
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def restore(self) -> None:
        self._is_cut = False

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with self._lock:
                    if self._is_cut:
                        client.close()
                        continue
                    server = socket.create_connection(self._server)
                    self._open += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=_pass_on, args=(source, sink), daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
    for each in (source, sink):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
