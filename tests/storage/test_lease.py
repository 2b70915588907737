"""A launcher that does not renew its lease is gone; with a slow clock or an unavailable store it is not."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import pytest
from clock import Clock

from ncsn.storage import heartbeat
from ncsn.storage.heartbeat import LEASE_SECONDS, Heartbeat, Lease, LeaseExpired


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the lease's reader."""
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


def test_silence_is_measured_on_the_readers_clock(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "lease.json"
    path.write_text("a beat, whatever its time")
    lease = pickle.loads(pickle.dumps(Lease(str(path), check_seconds=0)))
    assert not lease.expired(), "what the launcher's clock says does not matter"
    clock.sleep(0.7 * LEASE_SECONDS)
    path.write_text("another")
    assert not lease.expired()
    clock.sleep(0.7 * LEASE_SECONDS)
    assert not lease.expired()
    clock.sleep(0.7 * LEASE_SECONDS)
    assert lease.expired()
    with pytest.raises(LeaseExpired, match="all is saved"):
        lease.require("all is saved")


@pytest.mark.parametrize("unreadable", [False, True])
def test_a_lease_that_vanishes_expires_and_one_that_cannot_be_read_does_not(
    tmp_path: Path, clock: Clock, unreadable: bool
) -> None:
    path = tmp_path / "lease.json"
    path.write_text("1")
    lease = Lease(str(path), check_seconds=0)
    assert not lease.expired()
    path.unlink()
    if unreadable:
        path.mkdir()
    clock.sleep(1.3 * LEASE_SECONDS)
    assert lease.expired() != unreadable


def test_the_heart_beats_until_the_block_ends(tmp_path: Path) -> None:
    path, seen = tmp_path / "lease", set[float]()
    with Heartbeat(str(path), every=0.05):
        ends = time.monotonic() + 60
        while len(seen) < 3:
            assert time.monotonic() < ends
            seen.add(json.loads(path.read_text())["renewed_at"])
            time.sleep(0.01)
    last = path.read_text()
    time.sleep(0.2)
    assert path.read_text() == last
    assert LEASE_SECONDS > 2 * heartbeat.RENEW_SECONDS, "one beat that is lost is no silence"
