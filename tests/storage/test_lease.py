"""A launcher that does not renew its lease is gone; with a slow clock or an unavailable store it is not."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest
from clock import Clock

from ncsn import storage
from ncsn.storage import heartbeat
from ncsn.storage.heartbeat import LEASE_SECONDS, Heartbeat, Lease, is_abandoned


def renew(folder: Path, launcher: str, *, age: float = 0) -> None:
    """As a launcher does, at the store's time."""
    folder.mkdir(exist_ok=True)
    (folder / launcher).touch()
    os.utime(folder / launcher, (time.time() - age,) * 2)


def test_silence_of_all_launchers_is_measured_on_the_readers_clock(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(heartbeat, "time", clock := Clock())
    renew(tmp_path, "first", age=1e6)
    renew(tmp_path, "second", age=3e6)
    lease = pickle.loads(pickle.dumps(Lease(str(tmp_path), check_seconds=0)))
    assert not lease.expired(), "what other clocks say does not matter"
    clock.sleep(0.7 * LEASE_SECONDS)
    renew(tmp_path, "second", age=2e6)
    assert not lease.expired()
    clock.sleep(0.7 * LEASE_SECONDS)
    (tmp_path / "first").unlink()
    assert not lease.expired()
    clock.sleep(0.7 * LEASE_SECONDS)
    assert lease.expired(), "the end of a launcher is no sign of life"


@pytest.mark.parametrize("unreadable", [False, True])
def test_leases_that_vanish_expire_and_those_that_cannot_be_read_do_not(tmp_path, monkeypatch, unreadable) -> None:
    monkeypatch.setattr(heartbeat, "time", clock := Clock())
    folder = tmp_path / "lease"
    renew(folder, "first")
    lease = Lease(str(folder), check_seconds=0)
    assert not lease.expired()
    (folder / "first").unlink()
    if unreadable:
        folder.rmdir()
        folder.touch()
    clock.sleep(1.3 * LEASE_SECONDS)
    assert lease.expired() != unreadable


def test_the_heart_beats_until_the_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LEASE_SECONDS > 2 * heartbeat.RENEW_SECONDS, "one beat that is lost is no silence"
    monkeypatch.setattr(heartbeat, "RENEW_SECONDS", 0.05)
    seen = set[int]()
    with Heartbeat(str(tmp_path)) as heart:
        ends = time.monotonic() + 60
        while len(seen) < 3:
            assert time.monotonic() < ends
            seen.add((tmp_path / heart.id).stat().st_mtime_ns)
            time.sleep(0.01)
        heart.stays = True
    last = (tmp_path / heart.id).stat().st_mtime_ns
    time.sleep(0.2)
    assert (tmp_path / heart.id).stat().st_mtime_ns == last


def test_a_launcher_that_leaves_takes_its_lease_with_it(tmp_path: Path) -> None:
    """Else who starts the work again would not be alone for minutes."""
    with Heartbeat(str(tmp_path)):
        pass
    with Heartbeat(str(tmp_path)) as heart:
        assert heart.alone
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_knows_whether_it_is_alone(tmp_path: Path) -> None:
    """By the store's clock: the launchers' may be wrong."""
    renew(tmp_path, "gone", age=1.1 * LEASE_SECONDS)
    with Heartbeat(str(tmp_path)) as first:
        assert first.alone
        renew(tmp_path, "another", age=0.9 * LEASE_SECONDS)
        with Heartbeat(str(tmp_path)) as second:
            assert not second.alone


def test_of_launchers_that_leave_at_once_one_is_the_last(tmp_path: Path) -> None:
    """Each is told to end before it sees that the other goes."""
    with Heartbeat(str(tmp_path)) as first, Heartbeat(str(tmp_path)) as second:
        second._renew()
        first._renew()
        first.leave()
        second.leave()
        assert (first.alone, second.alone) == (False, True)
        assert list(tmp_path.iterdir()) == []
        second.stays = True
    assert [path.name for path in tmp_path.iterdir()] == [second.id], "what could not be ended may be attached to"


def test_leases_in_s3(s3_root: str) -> None:
    folder = f"{s3_root}/lease"
    assert not is_abandoned(folder, seconds=-60), "nobody ever held one"
    with Heartbeat(folder) as first, Heartbeat(folder) as second:
        assert (first.alone, second.alone) == (True, False)
        assert not is_abandoned(folder)
        assert is_abandoned(folder, seconds=-60)
        assert not Lease(folder).expired()
        assert storage.list_names(folder) == sorted((first.id, second.id))
    assert storage.list_names(folder) == []
