"""`ncsn submit --wait` tells the states of a run and its pods: KFP says RUNNING for ever of one that cannot start."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from kfp_api import KfpServer
from rayjobs import IMAGE
from refused import refused

from ncsn.storage.retry import RETRY
from pipelines.submit import KfpConnection, KfpError, Submission, connect, submit
from pipelines.wait import RunFailed, wait


@pytest.fixture
def connection(kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> KfpConnection:
    monkeypatch.setattr("pipelines.wait.LOOK_SECONDS", 0.1)
    return connect(kfp_server.url)


@pytest.fixture
def run(kfp_server: KfpServer, connection: KfpConnection) -> dict[str, Any]:
    """A run of the pipeline `train`, as the server has it."""
    found: dict[str, Any] = kfp_server.runs[
        submit(connection, Submission("train", "mine", {"config": "{}"}, experiment="tests")).id
    ]
    return found


def reach(run: dict[str, Any], state: str, **tasks: str) -> None:
    """Let a run and its tasks reach a state. KFP 2.17.0 lists Argo's nodes: each task, its tries, and more."""
    nodes = {"ncsn-train-sd9mr": state, "exit-handler-1": state, "ingest-driver": "SUCCEEDED", "executor": "SUCCEEDED"}
    details = [{"display_name": name, "state": reached} for name, reached in (nodes | tasks).items()]
    tries = [each | {"display_name": f"{each['display_name']}(0)"} for each in details]
    others = [{"display_name": "sample"}, {"execution_id": "1"}]  # a task that has not begun, and a node without a name
    run |= {"state": state, "run_details": {"task_details": [*others, *details, *tries]}}


def test_the_states_of_a_run_and_of_its_tasks_are_told_once_and_that_no_cluster_can_be_seen(
    connection: KfpConnection, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    said: list[str] = []

    def follow(line: str) -> None:
        said.append(line)
        if line == "PENDING":
            reach(run, "RUNNING", ingest="SUCCEEDED", train="RUNNING")
        elif line == "RUNNING":
            reach(run, "SUCCEEDED", ingest="SUCCEEDED", train="SUCCEEDED")

    wait(connection, run["run_id"], say=follow, poll_seconds=0.1)
    assert "KUBECONFIG" in said[0]
    assert said[1:] == [
        "PENDING",
        "Ingest images: SUCCEEDED",
        "Train score network: RUNNING",
        "RUNNING",
        "Train score network: SUCCEEDED",
        "SUCCEEDED",
    ]


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
def test_a_run_that_does_not_succeed_names_its_task_and_page(connection: KfpConnection, run: Any, state: str) -> None:
    reach(run, state, ingest="SUCCEEDED", train="FAILED")
    why = rf"{run['run_id']} .*{state} \(Train score network\): no count; .*{connection.host}/#/"
    with pytest.raises(RunFailed, match=why):
        wait(connection, run["run_id"], say=lambda _: None, why=lambda: "no count", poll_seconds=0.1)


def test_a_server_that_is_away_for_a_while_is_waited_for(
    kfp_server: KfpServer, connection: KfpConnection, run: Any
) -> None:
    states: list[str] = []

    def follow(state: str) -> None:
        if ":" in state and not state.startswith(RETRY):  # of a task
            return
        states.append(state)
        if state == "PENDING":
            kfp_server.away = True
        elif "unavailable" in state:
            run["state"] = "SUCCEEDED"
            kfp_server.away = False

    wait(connection, run["run_id"], say=follow, poll_seconds=0.1)
    assert [state for state in states if state.isupper()] == ["PENDING", "SUCCEEDED"]
    assert len(states) == 4  # one line when the server is gone and one when it is back


def test_a_run_that_is_gone_cannot_be_watched(connection: KfpConnection) -> None:
    with refused(connection.run_url("lost"), error=KfpError) as caught:
        wait(connection, "lost", say=lambda _: None, poll_seconds=0.1)
    assert "404" in str(caught.value)


def waits(reason: str, message: str) -> dict[str, Any]:
    """The status of a pod whose container waits."""
    state = {"name": "main", "image": IMAGE, "state": {"waiting": {"reason": reason, "message": message}}}
    return {"phase": "Pending", "containerStatuses": [state]}


def test_an_image_that_nobody_has_is_named_and_the_run_ended(
    emulation: Any, kfp_server: KfpServer, connection: KfpConnection, run: Any
) -> None:
    run["state"] = "RUNNING"
    said = f'Back-off pulling image "{IMAGE}": ErrImagePull: failed to pull: {IMAGE}: not found'
    emulation.add_task_pod("ingest", run_id=run["run_id"], **waits("ImagePullBackOff", said))
    with pytest.raises(RunFailed, match=f"Ingest images .*ImagePullBackOff: .*{IMAGE}"):
        wait(connection, run["run_id"], say=lambda _: None, poll_seconds=0.1)
    assert f"POST /apis/v2beta1/runs/{run['run_id']}:terminate" in kfp_server.requests


def test_what_may_get_better_is_told_once_and_waited_for(
    emulation: Any, connection: KfpConnection, run: Any, eventually: Any
) -> None:
    run["state"] = "RUNNING"
    said: list[str] = []
    emulation.add_task_pod("ingest", run_id=run["run_id"], **waits("ErrImagePull", "dial tcp: i/o timeout"))
    options = {"say": said.append, "poll_seconds": 0.1}
    waiting = threading.Thread(target=wait, args=(connection, run["run_id"]), kwargs=options)
    waiting.start()
    eventually(lambda: emulation.cluster.requests.count(("list", "pods")) >= 3, "three looks")
    run["state"] = "SUCCEEDED"
    waiting.join()
    assert len([line for line in said if "ErrImagePull" in line]) == 1
    assert said[-1] == "SUCCEEDED"


def test_a_run_whose_workflow_was_deleted_is_over(
    emulation: Any, connection: KfpConnection, run: Any, eventually: Any
) -> None:
    """KFP 2.17.0 says RUNNING of it for ever."""
    run["state"] = "RUNNING"
    user = {"apiGroups": ["argoproj.io"], "resources": ["workflows"], "verbs": ["list"]}
    emulation.cluster.rules = [*emulation.cluster.rules, user]
    metadata = {"name": "ncsn-train-sd9mr", "labels": {"pipeline/runid": run["run_id"]}}
    emulation.cluster.create("workflows", {"metadata": metadata})

    def delete() -> None:
        eventually(lambda: emulation.cluster.requests.count(("list", "workflows")) > 1, "the Workflow was seen")
        emulation.cluster.delete("workflows", "ncsn-train-sd9mr")

    deleting = threading.Thread(target=delete)
    deleting.start()
    with pytest.raises(RunFailed, match=f"{run['run_id']}.*terminated"):
        wait(connection, run["run_id"], say=lambda _: None, why=lambda: "terminated", poll_seconds=0.1)
    deleting.join()
