"""Pods that do not start, processes that are told to end, and logs of another attempt: as real clusters have them."""

from __future__ import annotations

import copy
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pod_states import crash_loop, unpullable

from ncsn.remote import kuberay, pods
from ncsn.remote.backend import RemoteFailure

HELLO = "print('done')"
SLEEP = "import time; print('running', flush=True); time.sleep(60)"
WORKFLOW: dict[str, Any] = {
    "apiVersion": "argoproj.io/v1alpha1",
    "kind": "Workflow",
    "metadata": {"name": "ncsn-train-x7"},
    "spec": {},
    "status": {"phase": "Running"},
}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look every 0.2 s, and trouble is believed after one."""
    monkeypatch.setattr(kuberay, "WATCH_SECONDS", 0.2)
    monkeypatch.setattr(pods, "CONFIRM_SECONDS", 1.0)


@pytest.fixture
def pipeline(emulation: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process is a task of a pipeline."""
    owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "ncsn-train-x7", "uid": "0c9d"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "task", "labels": {"pipeline/runid": "5f3a"}, "ownerReferences": [owner]},
        "spec": {"containers": [{"name": "main", "image": "ours:1.2"}]},
    }
    emulation.cluster.create("pods", pod)
    emulation.cluster.create("workflows", copy.deepcopy(WORKFLOW))
    monkeypatch.setenv("KFP_POD_NAME", "task")
    yield emulation
    emulation.cluster.delete("pods", "task")


def terminated(launcher: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> str:
    """What it says when it has ended."""
    launcher.send_signal(number)
    return launcher.communicate(timeout=240)[1]


@pytest.mark.usefixtures("hasty")
def test_an_image_that_cannot_be_pulled_ends_it_by_name(emulation, eventually, capsys) -> None:
    emulation.operator.head = unpullable
    image = "registry.example/ncsn-python:0.1.0"
    with pytest.raises(RemoteFailure, match=rf"ImagePullBackOff: .*{image}.*pull access denied"):
        emulation.execute(HELLO)
    eventually(lambda: not emulation.jobs, "the RayJob is gone")
    assert len(emulation.operator.clusters) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "ImagePullBackOff" in line]
    assert len(told) == 1, "it is said when it is seen, once"


@pytest.mark.usefixtures("hasty")
def test_a_crash_loop_shows_its_last_lines(emulation, eventually, capsys) -> None:
    emulation.operator.head = crash_loop
    emulation.operator.last_words = [
        *(f"line {number}" for number in range(20)),
        "Traceback (most recent call last):",
        "ray.exceptions.AuthenticationError: no authentication token was found",
    ]
    with pytest.raises(RemoteFailure, match=r"CrashLoopBackOff: .* 1 .*AuthenticationError: "):
        emulation.execute(HELLO)
    eventually(lambda: not emulation.jobs, "the RayJob is gone")
    shown = capsys.readouterr().err
    assert "line 19" in shown and "line 2\n" not in shown


@pytest.mark.usefixtures("hasty")
def test_a_quota_is_named_though_there_is_no_pod(emulation, capsys) -> None:
    quota = 'Failed to create head Pod, pods "x" is forbidden: exceeded quota: small, requested: requests.memory=6Gi'
    start = emulation.cluster.on_create

    def refuse(name: str) -> None:
        about = {"involvedObject": {"kind": "Job", "name": name}, "type": "Warning", "reason": "FailedCreate"}
        old = {"metadata": {"name": f"{name}.0"}, "message": f"an earlier job's: {quota}"}
        new = {"metadata": {"name": f"{name}.1"}, "message": quota}
        emulation.cluster.create("events", about | new | {"lastTimestamp": "2999-01-01T00:00:00Z"})
        emulation.cluster.create("events", about | old | {"lastTimestamp": "2026-01-01T00:00:00Z"})
        start(name)

    emulation.cluster.on_create = refuse
    emulation.execute_until(lambda: ("watch", "rayjobs") in emulation.cluster.requests)  # comes after the first look
    told = [line for line in capsys.readouterr().err.splitlines() if "exceeded quota: small" in line]
    assert len(told) == 1


def test_ctrl_c_waits_for_an_api_server_that_is_away(emulation, eventually) -> None:
    """A person has time."""
    launcher = emulation.launch(SLEEP)
    eventually(lambda: emulation.operator.started, "the entrypoint runs")
    emulation.cluster.away = True
    launcher.send_signal(signal.SIGINT)
    time.sleep(3)  # an API server that is asked once is given up at once
    emulation.cluster.away = False
    said = launcher.communicate(timeout=240)[1]
    eventually(lambda: not emulation.jobs, "the RayJob is gone")
    assert any("deleted" in line and line.startswith("RayJob ") for line in said.splitlines())


@pytest.mark.parametrize(
    "change",
    [{"spec": {"activeDeadlineSeconds": 0}}, {"spec": {"shutdown": "Terminate"}}, {"status": {"phase": "Failed"}}],
)
def test_sigterm_of_a_run_that_is_being_ended_deletes_the_rayjob(pipeline, eventually, change: dict) -> None:
    launcher = pipeline.launch(SLEEP)
    eventually(lambda: pipeline.operator.started, "the entrypoint runs")
    pipeline.cluster.update("workflows", "ncsn-train-x7", lambda workflow: workflow.update(change))
    terminated(launcher)
    assert launcher.returncode == 143
    eventually(lambda: not pipeline.jobs, "the RayJob is gone")


def test_an_evicted_launcher_leaves_the_rayjob_to_the_next_attempt(pipeline, eventually, said, tmp_path: Path) -> None:
    go = tmp_path / "go"
    code = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)\nprint('done')"
    launcher = pipeline.launch(code)
    eventually(lambda: pipeline.operator.started, "the entrypoint runs")
    terminated(launcher)
    assert launcher.returncode == 143
    (job,) = pipeline.jobs
    assert "deletionTimestamp" not in job["metadata"]

    def let_it_end() -> None:
        eventually(lambda: any("attached" in line for line in said), "the next attempt attaches")
        go.touch()

    thread = threading.Thread(target=let_it_end)
    thread.start()
    pipeline.execute(code)
    thread.join()
    assert pipeline.log == "done\n"
    assert len(pipeline.operator.started) == 1, "a second cluster was started"


def test_the_log_of_an_attempt_is_that_attempts(emulation, capsys) -> None:
    """The pods of the RayJob that was replaced are still there, under the same name."""
    emulation.operator.second, emulation.operator.linger = 100, 3
    with pytest.raises(RemoteFailure, match="the old error"):
        emulation.execute("raise ValueError('the old error')")
    capsys.readouterr()
    with pytest.raises(RemoteFailure, match="the new error"):
        emulation.execute("import time; time.sleep(2); raise ValueError('the new error')")
    assert "the old error" not in capsys.readouterr().err
    assert "the old error" not in emulation.log
