"""A server that is unavailable is waited for; an error that waiting does not change is raised at once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from clock import Clock
from refused import refused

from ncsn import storage
from ncsn.storage import retry
from ncsn.storage.retry import STORE_VARIABLE, Retry, call_store, limited


class Flaky:
    """Fails in the given ways, then answers."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.calls = list(failures), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return "answer"


def of_connection(error: Exception) -> str | None:
    return "no connection" if isinstance(error, ConnectionError) else None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Pauses and outages take no time."""
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    return clock


@pytest.fixture
def outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Takes the store away from this process."""
    monkeypatch.setenv(retry.OUTAGE_VARIABLE, str(tmp_path / "outages"))
    return lambda **arguments: retry.start_outage("store", **arguments)


def test_a_retry_says_once_that_it_waits_and_once_that_it_is_over() -> None:
    said: list[str] = []
    call = Flaky(*(ConnectionResetError() for _ in range(3)))
    assert Retry("the server", 60, of_connection, pauses=(0.01, 0.02), say=said.append)(call) == "answer"
    assert call.calls == 4
    assert len(said) == 2


def test_a_retry_gives_up_with_the_last_error_when_its_time_is_over(clock: Clock) -> None:
    failures = [ConnectionResetError() for _ in range(4)]
    call = Flaky(*failures)
    with pytest.raises(ConnectionResetError) as caught:
        Retry("the server", 0.5, of_connection, pauses=(0.1, 10))(call)
    assert caught.value is failures[2]
    for seconds, failure in ((0, ConnectionResetError()), (60, ValueError())):
        call = Flaky(failure)
        with pytest.raises(type(failure)):
            Retry("the server", seconds, of_connection)(call)
        assert call.calls == 1


def test_every_call_outlasts_an_outage(s3_root: str, outage, clock: Clock, caplog) -> None:
    storage.write_text(f"{s3_root}/a", "before")
    outage(seconds=1.0)
    started = clock.now
    with caplog.at_level(logging.WARNING):
        assert storage.read_text(f"{s3_root}/a") == "before"
    assert clock.now - started >= 1.0
    first, _ = (record.message for record in caplog.records if record.name.startswith("ncsn"))
    assert "120 s" in first
    outage(seconds=0.5)
    assert storage.publish_once(f"{s3_root}/once", b"first")
    outage(seconds=0.5)
    storage.write_text(f"{s3_root}/a", "after")
    assert storage.read_text(f"{s3_root}/a") == "after"


def test_a_flaky_store_takes_and_gives_every_byte(s3_root: str, outage) -> None:
    files = {"marker": b"", "small": b"abc", "large": bytes(range(256)) * (12 << 12)}  # above a part of an upload
    outage(seconds=60, share=0.4)
    with storage.staged_folder(f"{s3_root}/folder", marker="marker") as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    with storage.local_copy(f"{s3_root}/folder") as copy:
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == files


def test_the_store_is_given_up_after_the_limit_or_the_variable(
    s3_root: str, outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage(seconds=60)
    with limited(0), pytest.raises(ConnectionRefusedError):
        storage.exists(f"{s3_root}/a")
    monkeypatch.setenv(STORE_VARIABLE, "0.3")
    with pytest.raises(ConnectionRefusedError):
        storage.exists(f"{s3_root}/a")
    monkeypatch.setenv(STORE_VARIABLE, "long")
    with refused(STORE_VARIABLE):
        storage.exists(f"{s3_root}/a")


def test_what_waiting_does_not_change_is_raised_at_once(s3_root: str) -> None:
    call = Flaky(OSError("When reading 'key': AWS Error ACCESS_DENIED during GetObject operation"))
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        call_store(call)
    assert call.calls == 1
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{s3_root}/nothing")
