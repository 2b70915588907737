"""Several launchers of one step outside of Kubeflow, and what one asks of an API server that has no operator."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ncsn.remote import kuberay
from ncsn.remote.backend import RemoteLost
from ncsn.storage.heartbeat import LEASE_SECONDS

Wait = Callable[[Callable[[], object], str], None]


def leases(emulation: Any) -> set[Path]:
    return set(Path(emulation.step().lease).glob("[!.]*"))


def test_only_the_launcher_that_made_it_ends_a_rayjob(emulation: Any) -> None:
    """Others attach to it, if they want the same work."""
    first = emulation.launch()
    first.until("RayJob .* created .*")
    others = [emulation.launch() for _ in range(2)]
    for other in others:
        other.until("attached to .*")
    another = emulation.launch("other work")
    assert another.ended() == 1 and another.said[-1].startswith(f"UserError: {emulation.step().job_name}: ")
    for launcher, left in ((others[0], 1), (first, 0)):
        launcher.send_signal(signal.SIGINT)
        assert launcher.ended() in (130, -signal.SIGINT)
        assert len(emulation.jobs) == left
    assert others[1].ended() == 1
    assert others[1].said[-1].startswith("EndedByOther: "), "it may start the step again"


def test_a_rayjob_whose_maker_is_gone_is_that_of_the_launcher_that_is_left(emulation: Any, eventually: Wait) -> None:
    first = emulation.launch()
    first.until("RayJob .* created .*")
    (made,) = leases(emulation)
    second = emulation.launch()
    second.until("attached to .*")
    first.kill()
    first.communicate()
    os.utime(made, (time.time() - 1.1 * LEASE_SECONDS,) * 2)
    (mine,) = leases(emulation) - {made}
    for _ in range(2):
        before = mine.stat().st_mtime_ns
        eventually(lambda before=before: mine.stat().st_mtime_ns != before, "it has looked again")  # type: ignore[misc]
    second.send_signal(signal.SIGTERM)
    assert second.ended() == 143
    assert emulation.jobs == []


def test_a_rayjob_is_ours_though_the_answer_to_its_creation_was_lost(emulation: Any) -> None:
    lease = Path(emulation.step().lease)
    lease.mkdir(parents=True)
    (lease / "another").touch()
    emulation.cluster.on_create = lambda _: emulation.set_status("Complete", "SUCCEEDED")
    emulation.cluster.cut_answers = 1
    emulation.execute()
    assert emulation.jobs == []


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("deleted", [False, True])
def test_a_change_is_seen_at_once_and_until_then_nothing_is_asked(
    emulation: Any, eventually: Wait, monkeypatch: pytest.MonkeyPatch, *, away: bool, deleted: bool
) -> None:
    """Also one that happens while the connection is lost."""
    monkeypatch.setattr(kuberay, "LOOK_SECONDS", (1000, 1000))

    def change() -> None:
        eventually(lambda: ("watch", "rayjobs") in emulation.cluster.requests, "it watches")
        asked = len(emulation.cluster.requests)
        time.sleep(0.5)
        assert len(emulation.cluster.requests) == asked
        emulation.cluster.away = away
        if deleted:
            emulation.cluster.delete("rayjobs", emulation.step().job_name)
        else:
            emulation.set_status("Complete", "SUCCEEDED")
        time.sleep(0.2)
        emulation.cluster.away = False

    with pytest.raises(RemoteLost) if deleted else nullcontext():
        emulation.execute(meanwhile=change)
    assert emulation.jobs == []
    assert emulation.cluster.requests.count(("watch", "rayjobs")) <= 3
