"""Steps as jobs on a real Ray cluster with a token, through its dashboard. Launchers are processes of their own."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from do import do
from edited_clone import SAYS, clone
from ray_nodes import RayNodes
from refused import refused
from remote_places import TINY, RayHead
from tcp_proxy import TcpProxy

from ncsn import storage
from ncsn.config import from_yaml
from ncsn.config.compute import ComputeConfig
from ncsn.environment import CODE, KFP_RUN_ID
from ncsn.errors import UserError
from ncsn.remote.backend import RemoteStep
from ncsn.remote.manifest import render
from ncsn.remote.ray_jobs import RayJobs, Refused
from ncsn.runs.code import publish_code
from ncsn.runs.folder import Run, read_mistake
from ncsn.steps.elsewhere import remote_step
from ncsn.storage.heartbeat import Heartbeat

pytestmark = pytest.mark.timeout(900)
slow = pytest.mark.slow


@pytest.fixture
def jobs(ray_head: RayNodes, tmp_path: Path) -> Iterator[RayHead]:
    with TcpProxy(ray_head.dashboard) as proxy:
        yield RayHead(tmp_path, ray_head, proxy)


@pytest.fixture
def config(ray_head: RayNodes, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny experiment with its store in S3; this process has the tracking server of the cluster."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ray_head.environment["MLFLOW_TRACKING_URI"])
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.format(root=s3_root))
    return file


def test_training_runs_as_a_job(jobs: RayHead, config: Path) -> None:
    settings = from_yaml(config.read_text())
    do("ingest", settings, "mine")
    arguments = ("train", "--config", str(config), "--run", "mine", "--address", jobs.nodes.dashboard, "--json")
    done = jobs.ncsn(*arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["images_seen"] == 320
    assert storage.exists(f"{result['checkpoint']}/config.yaml")
    (job,) = jobs.of("mine")
    name = job["submission_id"]
    assert re.fullmatch(r"ncsn-mine-train-[0-9a-f]{8}", name)
    step = f"{settings.storage.root}/runs/mine/steps/train"
    known = job["metadata"]
    assert set(storage.list_names(step)) == {"step.json", "progress.json", "lease", "log.txt"}
    assert (known["mlflow.experiment"], known["mlflow.run_name"]) == ("ncsn", "mine/train")
    assert job["runtime_env"]["env_vars"].keys() == {"MLFLOW_TRACKING_URI", "RAY_JOB_STOP_WAIT_TIME_S"}
    assert f"Ray job {name}: SUCCEEDED" in done.stderr
    assert storage.list_names(f"{step}/lease") == [known["ncsn.launcher"]]
    assert "images_seen" in storage.read_text(f"{step}/log.txt")
    from ncsn.tracking.client import client_at

    client = client_at(jobs.nodes.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("ncsn")
    (tracked,) = client.search_runs([experiment.experiment_id], f"tags.`ray.submission_id` = '{name}'")
    assert tracked.info.run_name == "train" and tracked.info.status == "FINISHED"
    assert tracked.data.tags["ray.dashboard_url"] == jobs.nodes.dashboard


@slow
def test_driver_and_worker_run_the_edited_code_of_a_clone(jobs: RayHead, config: Path, tmp_path: Path) -> None:
    """Ray has no trace of the clone but what the job client uploads."""
    do("ingest", from_yaml(config.read_text()), "edited")
    edited = clone(tmp_path / "clone")
    edited.edit("ncsn/training/loop.py")
    arguments = ("train", "--config", str(config), "--run", "edited", "--address", jobs.nodes.dashboard)
    done = edited.ncsn(*arguments, "--code", "here", env=jobs.environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.endswith(SAYS)]
    assert {line == SAYS for line in said} == {True, False}, "a worker's and the driver's"
    (job,) = jobs.of("edited")
    uri = job["runtime_env"]["env_vars"][CODE]
    assert len(job["runtime_env"]["py_modules"]) == 3
    from ncsn.tracking.client import client_at

    client = client_at(jobs.nodes.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("ncsn")
    (tracked,) = client.search_runs([experiment.experiment_id], f"tags.`ray.submission_id` = '{job['submission_id']}'")
    tags = tracked.data.tags
    assert (tags["ncsn.code.uri"], tags["mlflow.source.git.dirty"]) == (uri, "true")
    assert len(tags["mlflow.source.git.commit"]) == 40

    jobs.nodes.get("/api/jobs/")  # the cluster is well
    again = jobs.ncsn(*arguments, "--code", f"{uri.removesuffix('.zip')}-not.zip")
    assert again.returncode == 2, again.stderr


@slow
def test_workers_of_a_rayjob_run_what_its_driver_has_checked(
    jobs: RayHead, config: Path, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entrypoint on a real Ray, beside a template's modules; the driver puts another archive in the place."""
    settings = from_yaml(config.read_text())
    dataset = do("ingest", settings, "checked").uri
    edited = clone(tmp_path / "clone")
    edited.edit("ncsn/training/loop.py")
    with (edited.folder / "ncsn/training/loop.py").open("a") as text:
        text.write("import os\nfrom ncsn import storage\nstorage.write_bytes(os.environ['NCSN_CODE'], b'another')\n")
    monkeypatch.chdir(edited.folder)
    monkeypatch.setattr("ncsn.runs.code._PACKAGE", edited.folder / "ncsn")
    monkeypatch.setenv(CODE, "")
    publish_code(s3_root)
    step = remote_step("train", Run(settings, "checked"), settings, {"dataset": dataset})
    manifest = render(step, ComputeConfig(), namespace="kubeflow", image="ncsn:1", env={}, labels={})
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "__init__.py").touch()
    more = json.dumps({"py_modules": [str(tmp_path / "more")], "env_vars": {"A": "b"}})
    ray = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", jobs.nodes.dashboard]

    def submitted(name: str, place: list[str]) -> tuple[str, int, list[str]]:
        with Heartbeat(step.lease):
            done = subprocess.run(
                [*ray, "--submission-id", name, *place, "--", *shlex.split(manifest["spec"]["entrypoint"])],
                env=jobs.environment | {"RAY_AUTH_MODE": "token"},
                capture_output=True,
                text=True,
                check=False,
            )
        job = jobs.nodes.get(f"/api/jobs/{name}")
        said = [line for line in done.stdout.splitlines() if line.endswith(SAYS)]
        return job["status"], job["driver_exit_code"], said

    status, code, said = submitted("checked", ["--runtime-env-json", more])
    assert (status, code) == ("SUCCEEDED", 0)
    assert {line == SAYS for line in said} == {True, False}, "a worker's and the driver's"
    assert storage.read_bytes(os.environ[CODE]) == b"another"
    emptied = json.dumps({"env_vars": {"NCSN_CACHE_DIR": str(tmp_path / "another")}})  # as on the next cluster
    assert submitted("replaced", ["--runtime-env-json", emptied]) == ("FAILED", 2, [])
    assert read_mistake(step.folder, "train")


@slow
def test_plain_ray_job_submit_trains_from_a_config_in_s3(jobs: RayHead, config: Path, s3_root: str) -> None:
    """`ray job submit -- ncsn train --config s3://...`: nothing but Ray's own command and the installed package."""
    settings = from_yaml(config.read_text())
    do("ingest", settings, "plain")
    uri = f"{s3_root}/configs/tiny.yaml"
    storage.write_text(uri, config.read_text())
    ray = Path(sys.executable).with_name("ray")
    known = json.dumps({"mlflow.run_name": "plain/train"})
    submit = [str(ray), "job", "submit", "--address", jobs.nodes.dashboard, "--submission-id", "plain-train"]
    done = subprocess.run(
        [*submit, "--metadata-json", known, "--", "ncsn", "train", "--config", uri, "--run", "plain"],
        env=jobs.environment | {"RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    job = jobs.nodes.get("/api/jobs/plain-train")
    assert (job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert job["metadata"]["mlflow.run_name"] == "plain/train"
    result = json.loads(storage.read_text(f"{s3_root}/runs/plain/steps/train/step.json"))["result"]
    assert result["images_seen"] == 320


@slow
def test_a_search_its_best_and_scored_samples_run_as_jobs(jobs: RayHead, config: Path) -> None:
    """What the search leaves in the store is trained and sampled there; the score comes back while images are made."""
    root = from_yaml(config.read_text()).storage.root
    dataset = do("ingest", from_yaml(config.read_text()), "sought").uri

    def job(step: str, config_uri: str, run: str, *options: str) -> dict[str, Any]:
        place = ("--address", jobs.nodes.dashboard, "--json")
        done = jobs.ncsn(step, "--config", config_uri, "--run", run, *options, *place)
        assert done.returncode == 0, done.stderr
        assert re.search(rf"Ray job ncsn-{run}-{step}-[0-9a-f]{{8}}: SUCCEEDED", done.stderr), done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    search = "search={num_trials: 3, num_samples: 20, reduction_factor: 3}"
    found = job("search", str(config), "sought", "--set", search)
    assert found["config"] == f"{root}/runs/sought/search/best.yaml"
    assert [row["trial"] for row in found["trials"]] == [0, 1, 2]
    assert found["objective"] <= found["baseline"]
    trained = job("train", found["config"], "sought-best", "--dataset", dataset)
    assert trained["images_seen"] == 320
    best = from_yaml(storage.read_text(f"{trained['checkpoint']}/config.yaml"))
    assert (best.noise.sigma_1, asdict(best.sampling.sampler)) == (
        found["values"]["noise.sigma_1"],
        found["sampler"],
    )
    job("sample", found["config"], "sought-best", "--score", dataset)
    progress = json.loads(storage.read_text(f"{root}/runs/sought-best/steps/sample/progress.json"))
    assert re.fullmatch(r"FID \S+ \(\S+ to \S+\) of 8", progress["text"])


@slow
def test_another_python_is_refused_by_the_driver(jobs: RayHead, config: Path) -> None:
    """Nothing but the driver knows the cluster's Python, so it compares, and its mistake comes back as ours."""
    run = "python"
    do("ingest", from_yaml(config.read_text()), run)
    pretend = "import runpy, ncsn.environment as l; l.python_version = lambda: '3.9'; "
    code = f"{pretend}runpy.run_module('ncsn', run_name='__main__', alter_sys=True)"
    arguments = ["train", "--config", str(config), "--run", run, "--address", jobs.nodes.dashboard]
    done = jobs.ncsn(*arguments, code=code)
    here = ".".join(map(str, sys.version_info[:2]))
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: Python: ")
    assert here in error and "3.9" in error


@slow
def test_a_cluster_without_the_command_is_named(jobs: RayHead) -> None:
    launcher = jobs.launch("bare", "", command=("ncsn-of-another-name", "train"))
    assert launcher.ended() == 1
    (failure,) = [line for line in launcher.said if line.startswith("RemoteFailure: ")]
    (job,) = jobs.of("bare")
    assert job["submission_id"] in failure and "`ncsn`" in failure


def client_of(address: str | None) -> RayJobs:
    return RayJobs(ComputeConfig.model_validate({"backend": "ray-jobs", "ray_jobs": {"address": address}}))


@slow
@pytest.mark.parametrize("token", ["", "f" * 64])
def test_a_missing_or_wrong_token_is_refused(jobs: RayHead, token: str) -> None:
    """In another process: Ray reads its token once."""
    code = "from ncsn.config.compute import RayJobsConfig, ComputeConfig\nfrom ncsn.remote.ray_jobs import RayJobs\n"
    code += f"RayJobs(ComputeConfig(ray_jobs=RayJobsConfig(address={jobs.nodes.dashboard!r}))).connect()"
    plain = {name: text for name, text in os.environ.items() if not name.startswith("RAY_A")}
    environment = plain | {"HOME": str(jobs.folder)} | ({"RAY_AUTH_TOKEN": token} if token else {})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("PermissionError: ") and jobs.nodes.dashboard in last, done.stderr


@dataclass
class Dashboard:
    """Answers to `METHOD /path`, in order; the last one stays."""

    answers: dict[str, list[tuple[int, Any]]]
    url: str = ""
    seen: list[tuple[str, Any]] = field(default_factory=list)  # request, body


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    for name in [name for name in os.environ if name.startswith("RAY_A")]:
        monkeypatch.delenv(name)
    played = Dashboard({"GET /api/version": [(200, {"ray_version": metadata.version("ray")})]})

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = f"{self.command} {self.path}"
            played.seen.append((request, json.loads(body) if body else None))
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


def job(name: str, **metadata: str) -> dict[str, Any]:
    return {"type": "SUBMISSION", "submission_id": name, "status": "RUNNING", "entrypoint": "", "metadata": metadata}


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
    jobs = [
        job("by-hand", **{"ncsn.run": "mine"}),
        job("of-a", **{"ncsn.run": "mine", "ncsn.kfp_run": "a"}),
        job("of-b", **{"ncsn.run": "mine", "ncsn.kfp_run": "b"}),
        job("other-of-a", **{"ncsn.run": "theirs", "ncsn.kfp_run": "a"}),
    ]
    dashboard.answers["GET /api/jobs/"] = [(200, jobs)]
    names = [each["submission_id"] for each in jobs]
    dashboard.answers |= {f"POST /api/jobs/{name}/stop": [(200, {"stopped": True})] for name in names}
    assert client_of(dashboard.url).stop(run=run, kfp_run=kfp_run) == stopped
    posted = [request for request, _ in dashboard.seen if request.startswith("POST")]
    assert posted == [f"POST /api/jobs/{name}/stop" for name in stopped]


def test_a_refused_submission_is_told_with_its_last_line(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KFP_RUN_ID, "5f3a")
    dashboard.answers |= {"GET /api/jobs/": [(200, [])], "POST /api/jobs/": [(400, "Traceback\nValueError: no")]}
    with pytest.raises(Refused, match="ValueError: no"):
        client_of(dashboard.url).execute(RemoteStep(str(tmp_path), "mine", "train", ("ncsn", "train")))
    (body,) = [body for request, body in dashboard.seen if request == "POST /api/jobs/"]
    assert body["metadata"]["ncsn.kfp_run"] == "5f3a"
    assert body["runtime_env"].keys() == {"env_vars"}, "nothing is uploaded"


@pytest.mark.parametrize("answer", [(503, "busy"), (500, "No available agent to submit job")])
def test_a_head_that_is_unavailable_is_asked_again(
    dashboard: Dashboard, answer: tuple[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.answers["GET /api/jobs/"] = [answer, (200, [])]
    assert client_of(dashboard.url).stop(run="mine", kfp_run=None) == []
    assert str(answer[0]) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "answer", "error"),
    [
        (401, "no", PermissionError),
        (403, "no", PermissionError),
        (404, "no", UserError),
        (400, "no", UserError),
        (200, "<html>Sign in</html>", UserError),
        (200, {"version": "4"}, UserError),
        (200, {"ray_version": "2.99.0"}, UserError),
    ],
)
def test_what_is_no_dashboard_of_ours_is_one_line(
    dashboard: Dashboard, status: int, answer: Any, error: type[Exception]
) -> None:
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
def test_what_is_no_address_is_refused(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, address: str | None, variables: dict[str, str], key: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with refused(key):
        client_of(address).connect()


def test_nobody_there_is_one_line(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncsn.remote.ray_jobs.FIRST_PATIENCE_SECONDS", 0.1)
    with pytest.raises(ConnectionError) as caught:
        client_of("http://127.0.0.1:9").connect()
    assert "http://127.0.0.1:9" in str(caught.value) and "\n" not in str(caught.value)
