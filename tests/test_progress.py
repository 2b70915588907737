"""The progress of a step: published by a thread, throttled, never in the way of the work."""

import io
import json
import pickle
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from ncsn import storage
from ncsn.progress import PublishedProgress, say
from ncsn.storage import heartbeat
from ncsn.storage.heartbeat import LeaseExpired


def test_it_is_published_throttled_and_goes_on_in_another_process(tmp_path: Path, eventually) -> None:
    file = tmp_path / "steps" / "train" / "progress.json"
    progress = PublishedProgress(str(file), interval=3600)
    progress.start(10, "images")
    eventually(file.exists, "the start is published")
    progress.advance(2)
    assert json.loads(file.read_text()) == {"done": 0, "total": 10, "unit": "images", "text": ""}
    progress.text = "on the way"
    pickle.loads(pickle.dumps(progress)).advance(8)
    assert progress.done == 2
    assert json.loads(file.read_text()) == {"done": 10, "total": 10, "unit": "images", "text": "on the way"}
    progress.advance(8)
    progress.note("and that is that")
    assert json.loads(file.read_text())["text"] == "and that is that"


def test_the_work_does_not_wait_for_a_slow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a write that hangs: what is written in the end is the last record."""
    allowed, written = threading.Event(), list[dict[str, Any]]()

    def slow(_uri: str, record: dict[str, Any]) -> None:
        assert allowed.wait(60)
        written.append(record)

    monkeypatch.setattr(storage, "write_json", slow)
    progress = PublishedProgress(str(tmp_path / "progress.json"), interval=0)
    progress.start(1000, "images")
    for _ in range(999):
        progress.advance()
    assert written == []
    allowed.set()
    progress.advance()
    assert written[-1]["done"] == 1000
    assert len(written) < 1000


def test_a_store_that_cannot_be_written_stops_nothing_but_the_end_of_its_launcher_does(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(heartbeat, "LEASE_SECONDS", -1.0)
    progress = PublishedProgress(str(tmp_path / "file" / "progress.json"), lease=str(tmp_path / "lease"))
    progress.start(2, "images")
    with pytest.raises(LeaseExpired, match="1 of 2 images"):
        progress.advance()


def test_a_signal_that_interrupts_a_line_may_say_another(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """As SIGTERM does to a launcher, whose exit code must be its own."""

    class Interrupted(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            if signal.getsignal(signal.SIGTERM) is not before:
                signal.raise_signal(signal.SIGTERM)
            return len(data)

    before = signal.signal(signal.SIGTERM, lambda *_: say("the job is deleted"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Interrupted())))
    try:
        say("the job runs")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err == "the job is deleted\n"
