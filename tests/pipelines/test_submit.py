"""Submission with KFP's real client, and who may connect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kfp_api import KfpServer
from refused import refused

from pipelines.submit import KfpError, Submission, arguments_for, connect, submit


def test_the_environment_names_the_server(kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", f"{kfp_server.url}/")
    for kfp_server.behind_ui in (False, True):
        connection = connect(None)
        assert (connection.host, connection.version, connection.namespace) == (kfp_server.url, "2.17.0-emulator", None)
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://pages")
    assert connection.run_url("1") == "https://pages/#/runs/details/1"
    kfp_server.multi_user = True
    assert connect(None, namespace="mine").namespace == "mine"


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
