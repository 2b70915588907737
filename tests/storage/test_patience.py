"""A store that is away is waited for; what waiting does not mend is an error at once."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from refused import refused

from ncsn import storage
from ncsn.storage import retry
from ncsn.storage.retry import PATIENCE_VARIABLE, limited, patiently


@pytest.fixture
def outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Takes the store away from this process."""
    monkeypatch.setenv(retry.OUTAGE_VARIABLE, str(tmp_path / "outages"))
    return lambda **arguments: retry.declare("store", **arguments)


def test_every_call_outlasts_an_outage_and_one_line_says_so(s3_root: str, tmp_path: Path, outage, caplog) -> None:
    storage.write_text(f"{s3_root}/a", "before")
    outage(seconds=1.0)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert storage.read_text(f"{s3_root}/a") == "before"
    assert time.monotonic() - started >= 0.5
    first, second = (record.message for record in caplog.records)
    assert first.startswith("the store is away, trying again for 120 s: rehearsal: ")
    assert second.startswith("the store answers again after ")
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


def test_patience_ends(s3_root: str, outage, monkeypatch: pytest.MonkeyPatch) -> None:
    outage(seconds=60)
    with limited(0), pytest.raises(ConnectionRefusedError, match="rehearsal: the store server is away"):
        storage.exists(f"{s3_root}/a")
    monkeypatch.setenv(PATIENCE_VARIABLE, "0.3")
    with pytest.raises(ConnectionRefusedError):
        storage.exists(f"{s3_root}/a")


def test_a_patience_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "long")
    with refused(PATIENCE_VARIABLE):
        patiently(list)


def test_what_waiting_does_not_mend_is_raised_at_once(s3_root: str) -> None:
    tries = []

    def call() -> None:
        tries.append(1)
        raise OSError("When reading 'key': AWS Error ACCESS_DENIED during GetObject operation")

    with pytest.raises(OSError, match="ACCESS_DENIED"):
        patiently(call)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{s3_root}/nothing")
    assert len(tries) == 1
