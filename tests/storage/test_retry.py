"""A server that is unavailable is waited for; an error that waiting does not change is raised at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import requests
import urllib3
from clock import Clock
from ports import TcpProxy
from refused import refused
from s3_server import S3Server

from ncsn import storage
from ncsn.storage import retry, s3
from ncsn.storage.retry import STORE_VARIABLE, Retry, limited, unavailable


@pytest.fixture
def network(s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[TcpProxy]:
    """The connection between this process and its store."""
    with TcpProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3.client.cache_clear()
        s3.bucket_filesystem.cache_clear()
        yield proxy


def test_a_retry_says_that_it_waits_and_that_it_is_over_or_gives_up_with_the_last_error(monkeypatch) -> None:
    monkeypatch.setattr(retry, "time", Clock())
    said: list[str] = []
    failures = [ConnectionResetError() for _ in range(3)]
    call = Mock(side_effect=[*failures, "answer"])
    assert Retry("the server", 60, pauses=(0.01, 0.02), say=said.append)(call) == "answer"
    assert (call.call_count, len(said)) == (4, 2)
    with pytest.raises(ConnectionResetError) as caught:
        Retry("the server", 0.5, pauses=(0.1, 10))(Mock(side_effect=[*failures, "answer"]))
    assert caught.value is failures[2]
    for seconds, failure in ((0, ConnectionResetError()), (60, ValueError())):
        call = Mock(side_effect=[failure, "answer"])
        with pytest.raises(type(failure)):
            Retry("the server", seconds)(call)
        assert call.call_count == 1


class ApiError(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (ApiError(503), True),
        (ApiError(500), True),
        (ApiError(429), True),
        (ApiError(404), False),
        (requests.Timeout(), True),
        (urllib3.exceptions.ProtocolError(), True),
        (urllib3.exceptions.LocationParseError("?"), False),
        (OSError("When reading 'key': AWS Error NETWORK_CONNECTION during GetObject operation"), True),
        (OSError("When reading 'key': AWS Error ACCESS_DENIED during GetObject operation"), False),
    ],
)
def test_it_waits_for_servers_and_not_for_mistakes(error: Exception, waits: bool) -> None:
    assert bool(unavailable(error)) == waits


def test_callers_outlast_an_outage(s3_root, network, caplog) -> None:
    """All that a store does, by many callers at once, while it is away for some seconds."""
    content, callers = bytes(range(256)) * (36 << 10), 4  # above a part of an upload
    ready = threading.Barrier(callers + 1)

    def call(number: int) -> None:
        uri = f"{s3_root}/{number}"
        storage.write_bytes(f"{uri}/before", content)
        ready.wait()
        time.sleep(0.05 * number)
        assert storage.read_bytes(f"{uri}/before") == content
        storage.write_bytes(f"{uri}/after", content)
        assert storage.publish_once(f"{uri}/once", b"first")
        filesystem, path = storage.filesystem(f"{uri}/after")
        with filesystem.open_input_file(path) as file:
            assert file.read() == content
        assert storage.list_names(uri) == ["after", "before", "once"]

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(callers) as pool:
        calls = [pool.submit(call, number) for number in range(callers)]
        ready.wait()
        network.cut()
        time.sleep(3)
        network.restore()
        for each in calls:
            each.result()
    assert any("180 s" in record.message for record in caplog.records if record.name.startswith("ncsn"))


def test_the_store_is_given_up_after_the_limit_or_the_variable(s3_root, network, monkeypatch) -> None:
    network.cut()
    with limited(0), pytest.raises(OSError, match="s3://"):
        storage.read_bytes(f"{s3_root}/a")
    monkeypatch.setenv(STORE_VARIABLE, "0.6")
    with pytest.raises(OSError, match="s3://"):
        storage.read_bytes(f"{s3_root}/a")
    monkeypatch.setenv(STORE_VARIABLE, "long")
    with refused(STORE_VARIABLE):
        storage.exists(f"{s3_root}/a")
