"""A launcher that is silent for too long is gone; a slow clock or a store that is away is not."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import pytest

from ncsn.lease import Heartbeat, Lease, LeaseExpired


def beat(path: Path, number: int, *, seconds: float) -> None:
    path.write_text(json.dumps({"renewed_at": number, "seconds": seconds}))


def test_silence_is_measured_on_the_readers_clock(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    beat(path, -(10**9), seconds=0.3)
    lease = pickle.loads(pickle.dumps(Lease(str(path), check_seconds=0)))
    assert not lease.expired(), "what the launcher's clock says does not matter"
    time.sleep(0.2)
    beat(path, 1, seconds=0.3)
    assert not lease.expired()
    time.sleep(0.2)
    assert not lease.expired()
    time.sleep(0.2)
    assert lease.expired()
    with pytest.raises(LeaseExpired, match=r"has not renewed .*lease\.json for 0\.3 s: stopped; all is saved"):
        lease.require("all is saved")


def test_a_lease_that_vanishes_expires_too(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    beat(path, 1, seconds=0.1)
    lease = Lease(str(path), check_seconds=0)
    assert not lease.expired()
    path.unlink()
    time.sleep(0.2)
    assert lease.expired()


def test_a_store_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    beat(path, 1, seconds=0.1)
    lease = Lease(str(path), check_seconds=0)
    assert not lease.expired()
    path.unlink()
    path.mkdir()
    time.sleep(0.2)
    assert not lease.expired()


def test_a_lease_that_is_not_json_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    beat(path, 1, seconds=0.1)
    lease = Lease(str(path), check_seconds=0)
    assert not lease.expired()
    path.write_text(path.read_text()[:-5])
    time.sleep(0.2)
    assert not lease.expired()
    lease.require("all is saved")


def test_the_heart_beats_until_the_block_ends(tmp_path: Path) -> None:
    path, beats = tmp_path / "lease.json", []
    with Heartbeat(str(path), also=lambda: beats.append(1), every=0.05, lease=7):
        first = json.loads(path.read_text())
        assert first["seconds"] == 7
        ends = time.monotonic() + 10
        while len(beats) < 3:
            assert time.monotonic() < ends
            time.sleep(0.01)
    last = path.read_text()
    assert json.loads(last)["renewed_at"] > first["renewed_at"]
    time.sleep(0.2)
    assert path.read_text() == last
