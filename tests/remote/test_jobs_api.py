"""Ray's Jobs API over REST, against a dashboard whose answers are played."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from refused import refused

from ncsn.config.compute import ComputeConfig
from ncsn.process import KFP_RUN_ID
from ncsn.remote.backend import Conflict, RemoteStep
from ncsn.remote.jobs_api import JobsApi, NoSuchJob, Refused, _token_headers
from ncsn.remote.ray_jobs import RayJobs

JOB = {
    "submission_id": "ncsn-mine-train-1",
    "status": "RUNNING",
    "metadata": None,
    "start_time": 1,
    "message": None,
    "driver_exit_code": None,
}
DRIVER = JOB | {"submission_id": None}  # a program that was not submitted


@dataclass
class Dashboard:
    """Answers to `METHOD /path`, in order; the last one stays."""

    answers: dict[str, list[tuple[int, Any]]]
    url: str = ""
    seen: list[tuple[str, str | None, Any]] = field(default_factory=list)  # request, token, body


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Dashboard]:
    for name in [name for name in os.environ if name.startswith("RAY_A")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    played = Dashboard({"GET /api/version": [(200, {"ray_version": metadata.version("ray")})]})

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = f"{self.command} {self.path}"
            played.seen.append((request, self.headers.get("Authorization"), json.loads(body) if body else None))
            answers = played.answers.get(request, [(404, "unknown")])
            status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
            content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer

        def log_message(self, *_args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    played.url = f"http://127.0.0.1:{server.server_port}"
    yield played
    server.shutdown()
    server.server_close()


def test_a_job_is_submitted_with_what_is_installed_there(dashboard: Dashboard) -> None:
    """Nothing is uploaded: `runtime_env` names variables only."""
    dashboard.answers["POST /api/jobs/"] = [(200, {"submission_id": "name"})]
    JobsApi(f"{dashboard.url}/").submit("name", entrypoint="ncsn train", metadata={"a": "b"}, env={"C": "d"})
    request, _, body = dashboard.seen[-1]
    assert request == "POST /api/jobs/"
    assert body == {
        "submission_id": "name",
        "entrypoint": "ncsn train",
        "metadata": {"a": "b"},
        "runtime_env": {"env_vars": {"C": "d"}},
    }


@pytest.mark.parametrize(("known", "error"), [([(200, JOB)], Conflict), ([(404, "no")], Refused)])
def test_a_refused_submission_is_a_conflict_if_the_job_is_there(
    dashboard: Dashboard, known: list[Any], error: type[Exception]
) -> None:
    dashboard.answers |= {"POST /api/jobs/": [(500, "Traceback\nValueError: wrong")], "GET /api/jobs/name": known}
    with pytest.raises(error):
        JobsApi(dashboard.url).submit("name", entrypoint="", metadata={}, env={})


def test_submitted_jobs_are_listed_oldest_first(dashboard: Dashboard) -> None:
    late = JOB | {"submission_id": "late", "start_time": 2, "status": "STOPPED", "metadata": {"ncsn.run": "mine"}}
    dashboard.answers["GET /api/jobs/"] = [(200, [late, DRIVER, JOB])]
    found = JobsApi(dashboard.url).jobs()
    assert [(job.name, job.ended) for job in found] == [("ncsn-mine-train-1", False), ("late", True)]
    assert found[1].metadata == {"ncsn.run": "mine"}


@pytest.mark.parametrize(
    ("run", "kfp_run", "stopped"),
    [
        ("mine", None, ["by-hand", "of-a", "of-b"]),
        ("mine", "a", ["of-a"]),
        (None, "a", ["of-a", "other-of-a"]),
        (None, None, []),
    ],
)
def test_only_jobs_of_the_pipeline_run_are_stopped(
    dashboard: Dashboard, run: str | None, kfp_run: str | None, stopped: list[str]
) -> None:
    jobs = {
        "by-hand": {"ncsn.run": "mine"},
        "of-a": {"ncsn.run": "mine", "ncsn.kfp_run": "a"},
        "of-b": {"ncsn.run": "mine", "ncsn.kfp_run": "b"},
        "other-of-a": {"ncsn.run": "theirs", "ncsn.kfp_run": "a"},
    }
    dashboard.answers |= {f"POST /api/jobs/{name}/stop": [(200, {"stopped": True})] for name in jobs}
    found = [JOB | {"submission_id": name, "metadata": known} for name, known in jobs.items()]
    dashboard.answers["GET /api/jobs/"] = [(200, found)]
    backend = RayJobs(ComputeConfig.model_validate({"backend": "ray-jobs", "ray_jobs": {"address": dashboard.url}}))
    assert backend.stop(run=run, kfp_run=kfp_run) == stopped
    posted = [request for request, _, _ in dashboard.seen if request.startswith("POST")]
    assert posted == [f"POST /api/jobs/{name}/stop" for name in stopped]


@pytest.mark.parametrize("kfp_run", [None, "5f3a"])
def test_a_job_knows_its_pipeline_run(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kfp_run: str | None
) -> None:
    monkeypatch.delenv(KFP_RUN_ID, raising=False)
    if kfp_run:
        monkeypatch.setenv(KFP_RUN_ID, kfp_run)
    dashboard.answers |= {"GET /api/jobs/": [(200, [])], "POST /api/jobs/": [(400, "no")]}
    backend = RayJobs(ComputeConfig.model_validate({"backend": "ray-jobs", "ray_jobs": {"address": dashboard.url}}))
    with pytest.raises(Refused):
        backend.execute(RemoteStep(run="mine", step="train", uri=str(tmp_path), command=("ncsn", "train")))
    (body,) = [body for request, _, body in dashboard.seen if request == "POST /api/jobs/"]
    assert body["metadata"].get("ncsn.kfp_run") == kfp_run


@pytest.mark.parametrize("status", ["STOPPED", "SUCCEEDED", "FAILED", "PENDING", "RUNNING"])
def test_the_final_states_are_rays(dashboard: Dashboard, status: str) -> None:
    from ray.job_submission import JobStatus

    dashboard.answers["GET /api/jobs/x"] = [(200, JOB | {"status": status})]
    assert JobsApi(dashboard.url).job("x").ended == JobStatus(status).is_terminal()


def test_an_unknown_job_can_be_stopped_but_not_read(dashboard: Dashboard) -> None:
    api = JobsApi(dashboard.url)
    api.stop("unknown")
    assert dashboard.seen[-1][0] == "POST /api/jobs/unknown/stop"
    with pytest.raises(NoSuchJob):
        api.job("unknown")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((503, "busy"), "503"),
        ((500, "No available agent to submit job"), "500"),
        ((200, "<html>Back soon</html>"), "JSON"),
    ],
)
def test_a_head_that_is_unavailable_is_asked_again(
    dashboard: Dashboard, answer: tuple[int, str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.answers["GET /api/jobs/"] = [answer, (200, [])]
    assert JobsApi(dashboard.url).jobs() == []
    assert reason in capsys.readouterr().err
    dashboard.answers["GET /api/jobs/"] = [answer]
    with pytest.raises(ConnectionError):
        JobsApi(dashboard.url).impatient().jobs()


@pytest.mark.parametrize(
    ("status", "error"), [(401, PermissionError), (403, PermissionError), (404, Refused), (400, Refused)]
)
def test_a_refusal_is_one_line(dashboard: Dashboard, status: int, error: type[Exception]) -> None:
    dashboard.answers["GET /api/version"] = [(status, "first line\nlast line")]
    with pytest.raises(error) as caught:
        JobsApi(dashboard.url)
    assert dashboard.url in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", ["<html>Sign in</html>", {"version": "4"}, ["ray_version"]])
def test_a_web_server_that_is_no_dashboard_is_named(dashboard: Dashboard, answer: object) -> None:
    dashboard.answers["GET /api/version"] = [(200, answer)]
    with pytest.raises(Refused) as caught:
        JobsApi(dashboard.url)
    assert dashboard.url in str(caught.value)


def test_another_ray_is_refused(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the environment does not override the address, as it does with Ray's own client."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    dashboard.answers["GET /api/version"] = [(200, {"ray_version": "2.99.0"})]
    with refused(dashboard.url) as caught:
        JobsApi(dashboard.url)
    assert "ray==2.99.0" in caught.value.problems[0].hint


@pytest.mark.parametrize(
    ("address", "variables", "key"),
    [
        (None, {}, "compute.ray_jobs.address"),
        ("head:8265", {}, "compute.ray_jobs.address"),
        (None, {"RAY_ADDRESS": "head:6379"}, "RAY_ADDRESS"),
        (None, {"RAY_API_SERVER_ADDRESS": "head", "RAY_ADDRESS": "http://head:8265"}, "RAY_API_SERVER_ADDRESS"),
        ("http://[", {}, "http://["),
    ],
)
def test_what_is_no_address_is_refused(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, address: str | None, variables: dict[str, str], key: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with refused(key):
        JobsApi(address)


@pytest.mark.parametrize("patience", [0, 0.1])
def test_nobody_there_is_one_line(dashboard: Dashboard, patience: float) -> None:
    with pytest.raises(ConnectionError) as caught:
        JobsApi("http://127.0.0.1:9", patience=patience)
    assert "http://127.0.0.1:9" in str(caught.value) and "\n" not in str(caught.value)
    assert ("attaches" in str(caught.value)) == (patience > 0), "one call is no outage that work outlives"


# Variables -> the token that is sent; None if there is none to send.
TOKENS: list[tuple[dict[str, str], str | None]] = [
    ({"RAY_AUTH_MODE": "token"}, "of-the-home"),
    ({"RAY_AUTH_MODE": "TOKEN", "RAY_AUTH_TOKEN": " given "}, "given"),
    ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "FILE"}, "of-the-file"),
    ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "FILE", "RAY_AUTH_TOKEN": "given"}, "given"),
    ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/no/such/file"}, None),
    ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": " "}, None),
    ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "given"}, ""),
    ({}, ""),
]


@pytest.fixture
def home(dashboard: Dashboard, tmp_path: Path) -> Path:
    """Tokens in Ray's file of the home and in another."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-the-home\n")
    (tmp_path / "token").write_text("of-the-file\n")
    return tmp_path


@pytest.mark.parametrize(
    ("variables", "token"),
    [
        *TOKENS,
        ({"RAY_AUTH_TOKEN": "given"}, "given"),  # Ray sends it only if RAY_AUTH_MODE says so
        ({"RAY_AUTH_TOKEN_PATH": "FILE"}, "of-the-file"),
    ],
)
def test_the_token_comes_from_where_ray_looks_for_it(
    dashboard: Dashboard,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    token: str | None,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("FILE", str(home / "token")))
    if token is None:
        with pytest.raises(PermissionError):
            JobsApi(dashboard.url)
        assert dashboard.seen == []
        return
    JobsApi(dashboard.url)
    assert dashboard.seen[-1][1] == (f"Bearer {token}" if token else None)


@pytest.mark.parametrize("token", ["hunter2\n3", "hunter2 \N{SNOWMAN}", b"hunter2\xff"])
def test_a_token_that_no_header_holds_is_not_repeated(
    dashboard: Dashboard, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | bytes
) -> None:
    if isinstance(token, str):
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    else:
        (home / "token").write_bytes(token)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
    with refused("RAY_AUTH_TOKEN" if isinstance(token, str) else str(home / "token")) as caught:
        JobsApi(dashboard.url)
    assert "hunter2" not in str(caught.value) and dashboard.seen == []


@pytest.mark.slow
def test_rays_own_client_sends_the_same_token(home: Path) -> None:
    code = (
        "from ray._private.authentication import http_token_authentication as ours\n"
        "try: print(ours.get_auth_headers_if_auth_enabled({}).get('authorization', ''))\n"
        "except Exception as error: print(type(error).__name__)"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    asked = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=plain | {name: value.replace("FILE", str(home / "token")) for name, value in variables.items()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for variables, _ in TOKENS
    ]
    sent = [each.communicate(timeout=120)[0].splitlines()[-1] for each in asked]
    expected = ["AuthenticationError" if token is None else token and f"Bearer {token}" for _, token in TOKENS]
    assert sent == expected


def test_certificates_come_from_the_environment(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`https` with a private certificate authority, as with Ray's own client."""
    assert _token_headers("https://head") == {}
    seen: list[Any] = []
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    monkeypatch.setattr("requests.Session.send", lambda _self, _request, **options: seen.append(options["verify"]))
    with pytest.raises(AttributeError):  # there is no answer
        JobsApi("https://head")
    assert seen == [str(tmp_path / "ca.pem")]
