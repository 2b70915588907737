"""Several launchers of one step outside of Kubeflow, and what one asks of an API server that has no operator."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ncsn.remote import kuberay
from ncsn.remote.backend import RemoteLost
from ncsn.storage.heartbeat import LEASE_SECONDS

Wait = Callable[[Callable[[], object], str], None]


def set_status(emulation: Any, name: str, deployment: str, job: str) -> None:
    status = {"jobDeploymentStatus": deployment, "jobStatus": job}
    emulation.cluster.update("rayjobs", name, lambda rayjob: rayjob.update(status=status))


@pytest.fixture
def running(emulation: Any) -> Any:
    """A RayJob runs as soon as it is created, until the test says otherwise."""
    emulation.cluster.on_create = lambda name: set_status(emulation, name, "Running", "RUNNING")
    return emulation


def leases(emulation: Any) -> set[Path]:
    return set(Path(emulation.step("").lease).glob("[!.]*"))


def test_only_the_launcher_that_made_it_ends_a_rayjob(running: Any) -> None:
    first = running.launch("")
    first.until("RayJob .* created .*")
    others = [running.launch("") for _ in range(2)]
    for other in others:
        other.until("attached to .*")
    for launcher, left in ((others[0], 1), (first, 0)):
        launcher.send_signal(signal.SIGINT)
        assert launcher.ended() in (130, -signal.SIGINT)
        assert len(running.jobs) == left
    assert others[1].ended() == 1
    assert others[1].said[-1].startswith("EndedByOther: "), "it may start the step again"


def test_a_rayjob_whose_maker_is_gone_is_that_of_the_launcher_that_is_left(running: Any, eventually: Wait) -> None:
    first = running.launch("")
    first.until("RayJob .* created .*")
    (made,) = leases(running)
    second = running.launch("")
    second.until("attached to .*")
    first.kill()
    first.communicate()
    os.utime(made, (time.time() - 1.1 * LEASE_SECONDS,) * 2)
    (mine,) = leases(running) - {made}
    for _ in range(2):
        before = mine.stat().st_mtime_ns
        eventually(lambda before=before: mine.stat().st_mtime_ns != before, "it has looked again")  # type: ignore[misc]
    second.send_signal(signal.SIGTERM)
    assert second.ended() == 143
    assert running.jobs == []


def test_a_rayjob_is_ours_though_the_answer_to_its_creation_was_lost(running: Any) -> None:
    lease = Path(running.step("").lease)
    lease.mkdir(parents=True)
    (lease / "another").touch()
    running.cluster.on_create = lambda name: set_status(running, name, "Complete", "SUCCEEDED")
    running.cluster.cut_answers = 1
    running.execute("")
    assert running.jobs == []


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("deleted", [False, True])
def test_a_change_is_seen_at_once_and_until_then_nothing_is_asked(
    running: Any, eventually: Wait, monkeypatch: pytest.MonkeyPatch, *, away: bool, deleted: bool
) -> None:
    """Also one that happens while the connection is lost."""
    monkeypatch.setattr(kuberay, "LOOK_SECONDS", (1000, 1000))

    def change() -> None:
        eventually(lambda: ("watch", "rayjobs") in running.cluster.requests, "it watches")
        asked = len(running.cluster.requests)
        time.sleep(0.5)
        assert len(running.cluster.requests) == asked
        running.cluster.away = away
        (job,) = running.jobs
        if deleted:
            running.cluster.delete("rayjobs", job["metadata"]["name"])
        else:
            set_status(running, job["metadata"]["name"], "Complete", "SUCCEEDED")
        time.sleep(0.2)
        running.cluster.away = False

    if deleted:
        with pytest.raises(RemoteLost):
            running.execute("", meanwhile=change)
    else:
        running.execute("", meanwhile=change)
    assert running.jobs == []
    assert running.cluster.requests.count(("watch", "rayjobs")) <= 3
