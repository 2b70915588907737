"""Submission with KFP's real client, who may connect, and the wait for a run and its pods."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from kfp_api import KfpServer
from rayjobs import IMAGE
from refused import refused

from ncsn.storage.retry import RETRY
from pipelines import KfpError
from pipelines.submit import KfpConnection, Submission, arguments_for, connect, submit
from pipelines.wait import RunFailed, wait


def test_the_environment_names_the_server(kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", f"{kfp_server.url}/")
    for kfp_server.behind_ui in (False, True):
        connection = connect(None)
        assert (connection.host, connection.version, connection.namespace) == (kfp_server.url, "2.17.0-emulator", None)
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://pages")
    assert connection.run_url("1") == "https://pages/#/runs/details/1"
    kfp_server.multi_user = True
    assert connect(None, namespace="mine").namespace == "mine"


def test_a_token_a_cookie_and_a_token_file_open_the_door(kfp_server, monkeypatch, tmp_path) -> None:
    kfp_server.token, kfp_server.cookie = "secret", "authservice_session=secret"
    (tmp_path / "token").write_text("secret\n")
    for variable, value in (
        ("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token")),
        ("NCSN_KFP_COOKIE", "authservice_session=secret"),
        ("NCSN_KFP_TOKEN", "secret"),
    ):
        monkeypatch.setenv(variable, value)
        assert connect(kfp_server.url).client.list_experiments().experiments is None
        monkeypatch.delenv(variable)


@pytest.mark.parametrize(
    ("host", "server", "variables", "key", "said"),
    [
        ("URL", {"token": "right"}, {}, "URL", "HTTP 401"),
        ("URL", {"token": "right"}, {"NCSN_KFP_TOKEN": "hunter2"}, "URL", "refuses NCSN_KFP_TOKEN"),
        ("URL", {"token": "right", "login": True}, {}, "URL", "login"),
        ("URL", {"multi_user": True}, {}, "--namespace", "several users"),
        ("URL", {"ready": False}, {}, "URL", "ml-pipeline"),
        ("URL/elsewhere", {}, {}, "URL/elsewhere", "not a Kubeflow Pipelines API"),
        (None, {}, {}, "--host", ""),
        ("http://[", {}, {}, "--host", ""),
        ("https://me:hunter2@kubeflow.example", {}, {}, "--host", ""),
        ("URL", {}, {"NCSN_KFP_TOKEN": "hunter2\n3"}, "NCSN_KFP_TOKEN", ""),
        ("URL", {}, {"NCSN_KFP_TOKEN": "hunter2 \N{SNOWMAN}"}, "NCSN_KFP_TOKEN", ""),
        ("URL", {}, {"KF_PIPELINES_SA_TOKEN_PATH": "/no/such/token"}, "KF_PIPELINES_SA_TOKEN_PATH", ""),
    ],
)
def test_who_gets_nowhere_is_told_why_without_secrets(
    kfp_server: KfpServer,
    monkeypatch: pytest.MonkeyPatch,
    host: str | None,
    server: Any,
    variables: Any,
    key: str,
    said: str,
) -> None:
    vars(kfp_server).update(server)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with refused(key.replace("URL", kfp_server.url), error=KfpError) as caught:
        connect(host and host.replace("URL", kfp_server.url))
    assert said in str(caught.value) and "hunter2" not in str(caught.value)


TRAIN = Submission("train", "mine", {"config": "{}"}, experiment="tests")


def test_the_server_refuses_in_one_line(kfp_server: KfpServer) -> None:
    connection = connect(kfp_server.url)
    kfp_server.forbidden = True
    with refused(kfp_server.url, error=KfpError) as caught:
        submit(connection, TRAIN)
    assert all(fact in str(caught.value) for fact in ("'mine'", "'somebody'", "403"))
    assert kfp_server.runs == {}


def test_arguments_take_the_type_of_their_parameter() -> None:
    parameters = {"a": "NUMBER_DOUBLE", "b": "BOOLEAN", "c": "LIST", "d": "STRUCT", "e": "STRING"}
    spec = {"root": {"inputDefinitions": {"parameters": {k: {"parameterType": v} for k, v in parameters.items()}}}}
    given = {"a": "2", "b": "false", "c": "[1, x]", "d": "{k: v}", "e": "5"}
    assert arguments_for(spec, given) == {"a": 2, "b": False, "c": [1, "x"], "d": {"k": "v"}, "e": "5"}
    for hostile in ("[&a [x], *a]", "[" * 4000):
        with refused("--param") as caught:
            arguments_for(spec, {**given, "c": hostile})
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("expression", "kfp"),
    [("0 3 * * 1", "0 0 3 * * 1"), ("30 0 3 1,15 jan-jun *", "30 0 3 1,15 jan-jun *"), ("@daily", "@daily")],
)
def test_a_schedule_starts_one_run_at_a_time(kfp_server: KfpServer, expression: str, kfp: str) -> None:
    made = submit(connect(kfp_server.url), TRAIN, every=expression)
    assert made.url == f"{kfp_server.url}/#/recurringrun/details/{made.id}"
    recurring = kfp_server.recurring_runs[made.id]
    assert recurring["trigger"] == {"cron_schedule": {"cron": kfp}}
    assert (recurring["no_catchup"], recurring["max_concurrency"], recurring["mode"]) == (True, 1, "ENABLE")


@pytest.fixture
def connection(kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> KfpConnection:
    monkeypatch.setattr("pipelines.wait.LOOK_SECONDS", 0.1)
    return connect(kfp_server.url)


@pytest.fixture
def run(kfp_server: KfpServer, connection: KfpConnection) -> dict[str, Any]:
    """A run of the pipeline `train`, as the server has it."""
    return kfp_server.runs[submit(connection, TRAIN).id]


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


def test_a_server_that_is_away_for_a_while_is_waited_for(kfp_server, connection, run) -> None:
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


def test_an_image_that_nobody_has_is_named_and_the_run_ended(emulation, kfp_server, connection, run) -> None:
    run["state"] = "RUNNING"
    said = f'Back-off pulling image "{IMAGE}": ErrImagePull: failed to pull: {IMAGE}: not found'
    emulation.add_task_pod("ingest", run_id=run["run_id"], **waits("ImagePullBackOff", said))
    with pytest.raises(RunFailed, match=f"Ingest images .*ImagePullBackOff: .*{IMAGE}"):
        wait(connection, run["run_id"], say=lambda _: None, poll_seconds=0.1)
    assert f"POST /apis/v2beta1/runs/{run['run_id']}:terminate" in kfp_server.requests


def test_what_may_get_better_is_told_once_and_waited_for(emulation, connection, run, eventually) -> None:
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


def test_a_run_whose_workflow_was_deleted_is_over(emulation, connection, run, eventually) -> None:
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
