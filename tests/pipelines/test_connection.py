"""Who may connect to KFP, and what is said to those who may not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from kfp_api import KfpServer
from refused import refused

from pipelines.connection import KfpError, KfpRefusalError, connect


def test_the_environment_names_the_server(kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", f"{kfp_server.url}/")
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
        connection = connect(kfp_server.url)
        assert connection.client.list_experiments().experiments is None
        monkeypatch.delenv(variable)
    with refused(kfp_server.url, error=KfpRefusalError) as caught:
        connect(kfp_server.url)
    assert "401" in str(caught.value) and "NCSN_KFP_TOKEN" in caught.value.problems[0].hint


def test_a_wrong_token_is_not_shown(kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    kfp_server.token = "right"
    monkeypatch.setenv("NCSN_KFP_TOKEN", "mistaken")
    with refused(kfp_server.url, error=KfpRefusalError) as caught:
        connect(kfp_server.url)
    assert "NCSN_KFP_TOKEN" in caught.value.problems[0].reason
    assert "mistaken" not in str(caught.value)


def test_a_login_page_is_recognized(kfp_server: KfpServer) -> None:
    kfp_server.token, kfp_server.login = "right", True
    with refused(kfp_server.url, error=KfpRefusalError) as caught:
        connect(kfp_server.url)
    assert "login" in str(caught.value)


def test_a_server_of_several_users_needs_a_namespace(kfp_server: KfpServer) -> None:
    kfp_server.multi_user = True
    with refused("--namespace", error=KfpError):
        connect(kfp_server.url)
    assert connect(kfp_server.url, namespace="mine").namespace == "mine"
    kfp_server.multi_user = False
    with refused("--namespace", error=KfpError) as caught:
        connect(kfp_server.url, namespace="mine")
    assert caught.value.problems[0].value == "mine"


def test_nobody_there(kfp_server: KfpServer, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with refused(nobody, error=KfpError) as caught:
            connect(nobody)
    assert "--host" in caught.value.problems[0].hint
    with refused(f"{kfp_server.url}/elsewhere", error=KfpError) as caught:
        connect(f"{kfp_server.url}/elsewhere")
    assert "404" in str(caught.value)
    with refused("--host", error=KfpError):
        connect(None)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with refused("--host", error=KfpError) as caught:
        connect("https://me:hunter2@kubeflow.example")
    assert "hunter2" not in str(caught.value)


def test_what_is_no_address_is_named() -> None:
    with refused("--host", error=KfpError):
        connect("http://[")


def test_a_token_that_no_header_holds_is_not_repeated(kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("hunter2\n3", "hunter2 \N{SNOWMAN}"):
        monkeypatch.setenv("NCSN_KFP_TOKEN", token)
        with refused("NCSN_KFP_TOKEN", error=KfpError) as caught:
            connect(kfp_server.url)
        assert "hunter2" not in str(caught.value)


def test_a_token_file_that_is_not_there(kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", "/no/such/token")
    with refused("KF_PIPELINES_SA_TOKEN_PATH", error=KfpError) as caught:
        connect(kfp_server.url)
    assert caught.value.problems[0].value == "/no/such/token"


def test_the_version_is_read_through_the_user_interface_too(kfp_server: KfpServer) -> None:
    for kfp_server.behind_ui in (False, True):
        assert connect(kfp_server.url).version == "2.17.0-emulator"


def test_a_user_interface_without_the_api_behind_it(kfp_server: KfpServer) -> None:
    kfp_server.ready = False
    with refused(kfp_server.url, error=KfpError) as caught:
        connect(kfp_server.url)
    assert "ml-pipeline" in caught.value.problems[0].hint
