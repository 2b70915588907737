"""`ncsn submit --wait` sees the pods of its run: KFP says RUNNING for ever of one that cannot start (2.17.0)."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from kfp_api import KfpServer
from rayjobs import IMAGE

from pipelines.submit import Submission, connect, submit
from pipelines.wait import RunFailed, wait


def waits(reason: str, message: str) -> dict[str, Any]:
    state = {"name": "main", "image": IMAGE, "state": {"waiting": {"reason": reason, "message": message}}}
    return {"phase": "Pending", "containerStatuses": [state]}


@pytest.fixture
def started(kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """A run that KFP says is RUNNING, whatever its pods do."""
    monkeypatch.setattr("pipelines.wait.LOOK_SECONDS", 0.1)
    connection = connect(kfp_server.url)
    run_id = submit(connection, Submission("train", "mine", {"config": "{}"}, experiment="tests")).id
    kfp_server.runs[run_id]["state"] = "RUNNING"
    return connection, run_id


def test_an_image_that_nobody_has_is_named_and_the_run_ended(
    emulation: Any, kfp_server: KfpServer, started: tuple[Any, str]
) -> None:
    connection, run_id = started
    said = f'Back-off pulling image "{IMAGE}": ErrImagePull: failed to pull: {IMAGE}: not found'
    emulation.add_task_pod("ingest", run_id=run_id, **waits("ImagePullBackOff", said))
    with pytest.raises(RunFailed, match=f"Ingest images .*ImagePullBackOff: .*{IMAGE}"):
        wait(connection, run_id, say=lambda _: None, poll_seconds=0.1)
    assert f"POST /apis/v2beta1/runs/{run_id}:terminate" in kfp_server.requests


def test_what_may_get_better_is_told_once_and_waited_for(
    emulation: Any, kfp_server: KfpServer, started: tuple[Any, str], eventually: Any
) -> None:
    connection, run_id = started
    said: list[str] = []
    emulation.add_task_pod("ingest", run_id=run_id, **waits("ErrImagePull", "dial tcp: i/o timeout"))
    waiting = threading.Thread(target=wait, args=(connection, run_id), kwargs={"say": said.append, "poll_seconds": 0.1})
    waiting.start()
    listed = [("list", "pods")] * 3
    eventually(lambda: [each for each in emulation.cluster.requests if each == listed[0]][:3] == listed, "three looks")
    kfp_server.runs[run_id]["state"] = "SUCCEEDED"
    waiting.join()
    assert len([line for line in said if "ErrImagePull" in line]) == 1
    assert said[-1] == "SUCCEEDED"


def test_without_a_cluster_it_says_that_it_cannot_see(
    kfp_server: KfpServer, started: tuple[Any, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    connection, run_id = started
    kfp_server.runs[run_id]["state"] = "SUCCEEDED"
    said: list[str] = []
    wait(connection, run_id, say=said.append, poll_seconds=0.1)
    assert [line for line in said if "KUBECONFIG" in line] == said[:1]


def test_a_run_whose_workflow_was_deleted_is_over(emulation: Any, started: tuple[Any, str], eventually: Any) -> None:
    """KFP 2.17.0 says RUNNING of it for ever."""
    user = {"apiGroups": ["argoproj.io"], "resources": ["workflows"], "verbs": ["list"]}
    emulation.cluster.rules = [*emulation.cluster.rules, user]
    connection, run_id = started
    metadata = {"name": "ncsn-train-sd9mr", "labels": {"pipeline/runid": run_id}}
    emulation.cluster.create("workflows", {"metadata": metadata})

    def delete() -> None:
        eventually(lambda: emulation.cluster.requests.count(("list", "workflows")) > 1, "the Workflow was seen")
        emulation.cluster.delete("workflows", "ncsn-train-sd9mr")

    deleting = threading.Thread(target=delete)
    deleting.start()
    with pytest.raises(RunFailed, match=f"{run_id}.*terminated"):
        wait(connection, run_id, say=lambda _: None, why=lambda: "terminated", poll_seconds=0.1)
    deleting.join()
