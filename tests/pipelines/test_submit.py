"""Submission with KFP's real client, the wait for a run, and who may connect."""

import socket
from pathlib import Path
from typing import Any

import pytest
from kfp_api import KfpServer
from refused import refused

from ncsn.storage.retry import RETRY
from pipelines.submit import (
    KfpConnection,
    KfpError,
    KfpRefusalError,
    Submission,
    arguments_for,
    connect,
    submit,
)
from pipelines.wait import RunFailed, wait


def test_the_environment_names_the_server(kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", f"{kfp_server.url}/")
    for kfp_server.behind_ui in (False, True):
        connection = connect(None)
        assert (connection.host, connection.version, connection.namespace) == (kfp_server.url, "2.17.0-emulator", None)
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://pages")
    assert connection.run_url("1") == "https://pages/#/runs/details/1"


def test_a_token_a_cookie_and_a_token_file_open_the_door(
    kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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
    ("server", "credentials", "said"),
    [
        ({}, {}, "HTTP 401"),
        ({}, {"NCSN_KFP_TOKEN": "mistaken"}, "refuses NCSN_KFP_TOKEN"),
        ({"login": True}, {}, "login"),
    ],
)
def test_who_is_refused_hears_how_to_get_in(
    kfp_server: KfpServer,
    monkeypatch: pytest.MonkeyPatch,
    server: dict[str, Any],
    credentials: dict[str, str],
    said: str,
) -> None:
    vars(kfp_server).update(server, token="right")
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    with refused(kfp_server.url, error=KfpRefusalError) as caught:
        connect(kfp_server.url)
    assert said in str(caught.value) and "mistaken" not in str(caught.value)
    assert "NCSN_KFP_TOKEN" in caught.value.problems[0].hint


def test_a_namespace_is_for_servers_of_several_users(kfp_server: KfpServer) -> None:
    kfp_server.multi_user = True
    with refused("--namespace", error=KfpError):
        connect(kfp_server.url)
    assert connect(kfp_server.url, namespace="mine").namespace == "mine"
    kfp_server.multi_user = False
    with refused("--namespace", error=KfpError):
        connect(kfp_server.url, namespace="mine")


def test_nobody_there(kfp_server: KfpServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with refused(nobody, error=KfpError):
            connect(nobody)
    with refused(f"{kfp_server.url}/elsewhere", error=KfpError):
        connect(f"{kfp_server.url}/elsewhere")
    kfp_server.ready = False
    with refused(kfp_server.url, error=KfpError):
        connect(kfp_server.url)


@pytest.mark.parametrize("host", [None, "http://[", "https://me:hunter2@kubeflow.example"])
def test_what_is_no_address_is_refused_and_a_password_not_repeated(host: str | None) -> None:
    with refused("--host", error=KfpError) as caught:
        connect(host)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("NCSN_KFP_TOKEN", "hunter2\n3"),
        ("NCSN_KFP_TOKEN", "hunter2 \N{SNOWMAN}"),
        ("KF_PIPELINES_SA_TOKEN_PATH", "/no/such/token"),
    ],
)
def test_credentials_that_cannot_be_used(
    kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with refused(variable, error=KfpError) as caught:
        connect(kfp_server.url)
    assert "hunter2" not in str(caught.value)


TRAIN = Submission("train", "mine", {"config": "{}"}, experiment="tests")


@pytest.fixture
def started(kfp_server: KfpServer) -> tuple[KfpConnection, dict[str, Any]]:
    """A run of the pipeline `train`, as the server has it."""
    connection = connect(kfp_server.url)
    return connection, kfp_server.runs[submit(connection, TRAIN).id]


def reach(run: dict[str, Any], state: str, **tasks: str) -> None:
    """Let a run and its tasks reach a state. KFP 2.17.0 lists Argo's nodes: each task, its tries, and more."""
    nodes = {"ncsn-train-sd9mr": state, "exit-handler-1": state, "ingest-driver": "SUCCEEDED", "executor": "SUCCEEDED"}
    details = [{"display_name": name, "state": reached} for name, reached in (nodes | tasks).items()]
    tries = [each | {"display_name": f"{each['display_name']}(0)"} for each in details]
    others = [{"display_name": "sample"}, {"execution_id": "1"}]  # a task that has not begun, and a node without a name
    run |= {"state": state, "run_details": {"task_details": [*others, *details, *tries]}}


def test_the_states_of_a_run_and_of_its_tasks_are_told_once(started: tuple[KfpConnection, dict[str, Any]]) -> None:
    connection, run = started
    said: list[str] = []

    def follow(line: str) -> None:
        said.append(line)
        if line == "PENDING":
            reach(run, "RUNNING", ingest="SUCCEEDED", train="RUNNING")
        elif line == "RUNNING":
            reach(run, "SUCCEEDED", ingest="SUCCEEDED", train="SUCCEEDED")

    wait(connection, run["run_id"], say=follow, poll_seconds=0.1)
    assert [line for line in said if "pods" not in line] == [
        "PENDING",
        "Ingest images: SUCCEEDED",
        "Train score network: RUNNING",
        "RUNNING",
        "Train score network: SUCCEEDED",
        "SUCCEEDED",
    ]


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
def test_a_run_that_does_not_succeed_names_its_task_and_page(
    started: tuple[KfpConnection, dict[str, Any]], state: str
) -> None:
    connection, run = started
    reach(run, state, ingest="SUCCEEDED", train="FAILED")
    why = rf"{run['run_id']} .*{state} \(Train score network\): no count; .*{connection.host}/#/"
    with pytest.raises(RunFailed, match=why):
        wait(connection, run["run_id"], say=lambda _: None, why=lambda: "no count", poll_seconds=0.1)


def test_a_server_that_is_away_for_a_while_is_waited_for(
    kfp_server: KfpServer, started: tuple[KfpConnection, dict[str, Any]]
) -> None:
    connection, run = started
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


def test_a_run_that_is_gone_cannot_be_watched(kfp_server: KfpServer) -> None:
    connection = connect(kfp_server.url)
    with refused(connection.run_url("lost"), error=KfpError) as caught:
        wait(connection, "lost", say=lambda _: None, poll_seconds=0.1)
    assert "404" in str(caught.value)


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
