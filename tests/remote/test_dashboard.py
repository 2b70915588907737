"""What a launcher asks of a Ray dashboard, and what it says of one that refuses, is busy, or is none."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from answering import answering
from refused import refused

from ncsn.config.compute import ComputeConfig
from ncsn.environment import KFP_RUN_ID
from ncsn.errors import UserError
from ncsn.remote.backend import RemoteStep
from ncsn.remote.ray_jobs import RayJobs, Refused


def client_of(address: str | None) -> RayJobs:
    return RayJobs(ComputeConfig.model_validate({"backend": "ray-jobs", "ray_jobs": {"address": address}}))


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Its `answers` to `METHOD /path`, in order, of which the last one stays; `seen` are requests with their bodies."""
    for name in [name for name in os.environ if name.startswith("RAY_A")]:
        monkeypatch.delenv(name)
    answers = {"GET /api/version": [(200, {"ray_version": metadata.version("ray")})]}
    played = SimpleNamespace(answers=answers, seen=[])

    def answer(asked: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        request = f"{asked.command} {asked.path}"
        played.seen.append((request, json.loads(body) if body else None))
        answers = played.answers.get(request, [(404, "unknown")])
        status, content = answers.pop(0) if len(answers) > 1 else answers[0]
        return status, (content if isinstance(content, str) else json.dumps(content)).encode()

    with answering(answer) as played.url:
        yield played
    monkeypatch.undo()
    if "ray" in sys.modules:  # which reads its token once per process; a later test may start a Ray of its own here
        from ray._private.authentication_test_utils import reset_auth_token_state

        reset_auth_token_state()


@pytest.mark.parametrize(
    ("run", "kfp_run", "stopped"),
    [
        ("mine", None, ["by-hand", "of-a", "of-b"]),
        ("mine", "a", ["of-a"]),
        (None, "a", ["of-a", "other-of-a"]),
        (None, None, []),
    ],
)
def test_only_jobs_of_the_pipeline_run_are_stopped(dashboard, run, kfp_run, stopped) -> None:
    known = {
        "by-hand": {"ncsn.run": "mine"},
        "of-a": {"ncsn.run": "mine", "ncsn.kfp_run": "a"},
        "of-b": {"ncsn.run": "mine", "ncsn.kfp_run": "b"},
        "other-of-a": {"ncsn.run": "theirs", "ncsn.kfp_run": "a"},
    }
    running = {"type": "SUBMISSION", "status": "RUNNING", "entrypoint": ""}
    jobs = [running | {"submission_id": name, "metadata": metadata} for name, metadata in known.items()]
    dashboard.answers["GET /api/jobs/"] = [(200, jobs)]
    dashboard.answers |= {f"POST /api/jobs/{name}/stop": [(200, {"stopped": True})] for name in known}
    assert client_of(dashboard.url).stop(run=run, kfp_run=kfp_run) == stopped
    posted = [request for request, _ in dashboard.seen if request.startswith("POST")]
    assert posted == [f"POST /api/jobs/{name}/stop" for name in stopped]


def test_a_refused_submission_is_told_with_its_last_line(dashboard, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(KFP_RUN_ID, "5f3a")
    dashboard.answers |= {"GET /api/jobs/": [(200, [])], "POST /api/jobs/": [(400, "Traceback\nValueError: no")]}
    step = RemoteStep(str(tmp_path), "mine", "train", ("ncsn", "train"))
    with pytest.raises(Refused, match="ValueError: no"):
        client_of(dashboard.url).execute(step, accepted=lambda: pytest.fail("it was not accepted"))
    (body,) = [body for request, body in dashboard.seen if request == "POST /api/jobs/"]
    assert body["metadata"]["ncsn.kfp_run"] == "5f3a"
    assert body["runtime_env"].keys() == {"env_vars"}, "nothing is uploaded"


def test_a_head_that_is_unavailable_is_asked_again(dashboard, capsys) -> None:
    dashboard.answers["GET /api/jobs/"] = [(503, "busy"), (500, "No available agent to submit job"), (200, [])]
    assert client_of(dashboard.url).stop(run="mine", kfp_run=None) == []
    assert "503" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "answer", "error"),
    [
        (403, "no", PermissionError),
        (404, "no", UserError),
        (200, "<html>Sign in</html>", UserError),
        (200, {"version": "4"}, UserError),
        (200, {"ray_version": "2.99.0"}, UserError),
    ],
)
def test_what_is_no_dashboard_of_ours_is_one_line(dashboard, status, answer, error) -> None:
    dashboard.answers["GET /api/version"] = [(status, answer)]
    with pytest.raises(error) as caught:
        client_of(dashboard.url).connect()
    assert dashboard.url in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "variables", "key"),
    [
        (None, {}, "compute.ray_jobs.address"),
        (None, {"RAY_ADDRESS": "head:6379"}, "RAY_ADDRESS"),
        (None, {"RAY_API_SERVER_ADDRESS": "head", "RAY_ADDRESS": "http://head:8265"}, "RAY_API_SERVER_ADDRESS"),
        ("http://head:8265", {"RAY_ADDRESS": "http://another:8265"}, "RAY_ADDRESS"),
        ("http://[", {}, "http://["),
    ],
)
@pytest.mark.usefixtures("dashboard")  # without an address of Ray in the environment
def test_what_is_no_address_is_refused(monkeypatch, address, variables, key) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with refused(key):
        client_of(address).connect()


@pytest.mark.usefixtures("dashboard")
def test_nobody_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncsn.remote.ray_jobs.FIRST_PATIENCE_SECONDS", 0.1)
    with pytest.raises(ConnectionError) as caught:
        client_of("http://127.0.0.1:9").connect()
    assert "http://127.0.0.1:9" in str(caught.value) and "\n" not in str(caught.value)
