"""Steps as jobs on a real Ray cluster with a token, through its dashboard. Launchers are processes of their own."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import RayNodes
from tcp_proxy import TcpProxy

from ncsn import storage
from ncsn.config import from_yaml
from ncsn.steps import ingest

pytestmark = pytest.mark.timeout(900)
slow = pytest.mark.slow

TINY = """
name: tiny
data: {{source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3, max_images: 128}}
noise: {{num_levels: 4}}
network: {{kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}}
train: {{batch_size: 32, num_images: 160, ema_decay: 0.9, checkpoint_every_images: 160, report_every_images: 32}}
sampling: {{num_images: 8, batch_size: 8, sampler: {{kind: annealed_langevin, steps_per_level: 1}}}}
evaluation: {{classifier_epochs: 1, num_splits: 2}}
storage: {{root: "{root}"}}
"""
_LAUNCHER = """
import json, sys
from ncsn.remote.backend import RemoteFailure, RemoteStep
from ncsn.remote.ray_jobs import RayJobs
from ncsn.config.compute import ComputeConfig
address, step = sys.argv[1], json.loads(sys.argv[2])
jobs = RayJobs(ComputeConfig.model_validate({"ray_jobs": {"address": address}}), renew_seconds=0.5)
try:
    jobs.execute(RemoteStep(**step | {"command": tuple(step["command"])}))
except (RemoteFailure, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@dataclass
class Jobs:
    """A cluster, and steps whose command is Python code."""

    nodes: RayNodes
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """As a user has it: the token, and no mode and no address."""
        return {
            name: value for name, value in self.nodes.client.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")
        }

    def launch(self, run: str, code: str, *, address: str = "", command: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        uri = str(self.folder / "runs" / run / "steps" / "train")
        command = command or ("python", "-c", code, "train")
        step = {
            "run": run,
            "step": "train",
            "uri": uri,
            "command": command,
            "facts": {"mlflow.run_name": f"{run}/train"},
        }
        arguments = [sys.executable, "-c", _LAUNCHER, address or self.nodes.dashboard, json.dumps(step)]
        return subprocess.Popen(arguments, env=self.environment, stderr=subprocess.PIPE, text=True)

    def log(self, run: str) -> str:
        return (self.folder / "runs" / run / "steps/train/driver.log").read_text()

    def of(self, run: str) -> list[dict[str, Any]]:
        """The jobs of a run, oldest first."""
        mine = [job for job in self.nodes.get("/api/jobs/") if (job["metadata"] or {}).get("ncsn.run") == run]
        return sorted(mine, key=lambda job: job["start_time"])

    def ncsn(self, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ncsn", *args],
            env=self.environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def jobs(s3_server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("jobs")
    database = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    with RayNodes(folder, count=1, cpus=2, environment=s3_server.environment | database) as nodes:
        yield Jobs(nodes, folder)


@pytest.fixture
def config(jobs: Jobs, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny experiment with its store in S3; this process has the tracking server of the cluster."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", jobs.nodes.environment["MLFLOW_TRACKING_URI"])
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.format(root=s3_root))
    return file


def ended(process: subprocess.Popen[str]) -> str:
    """What the launcher said, once it has ended."""
    _, err = process.communicate(timeout=600)
    return err


def until(process: subprocess.Popen[str], line: str) -> list[str]:
    """Wait until the launcher says the line; what it said before."""
    assert process.stderr is not None
    said = []
    for each in process.stderr:
        said.append(each.strip())
        if said[-1] == line:
            return said
    raise AssertionError(f"it ended without {line!r}: {said}")


def test_training_runs_as_a_job_and_what_is_rehearsed_happens_there(jobs: Jobs, config: Path) -> None:
    settings = from_yaml(config.read_text())
    ingest.run(settings, run="mine")
    arguments = ("train", "--config", str(config), "--run", "mine", "--address", jobs.nodes.dashboard, "--json")
    done = jobs.ncsn(*arguments, "--inject", "store-down@images=32:1s")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["images_seen"] == 160
    assert storage.exists(f"{result['checkpoint']}/config.yaml")
    (job,) = jobs.of("mine")
    name = job["submission_id"]
    assert re.fullmatch(r"ncsn-mine-train-[0-9a-f]{8}", name)
    step = f"{settings.storage.root}/runs/mine/steps/train"
    known = job["metadata"]
    assert f"config-{known['ncsn.config']}.yaml" in storage.list_names(step)
    assert (known["mlflow.experiment"], known["mlflow.run_name"]) == ("ncsn", "mine/train")
    assert job["runtime_env"]["env_vars"].keys() == {"MLFLOW_TRACKING_URI", "RAY_JOB_STOP_WAIT_TIME_S"}
    assert f"Ray job {name}: SUCCEEDED" in done.stderr
    log = storage.read_text(f"{step}/driver.log")
    assert "images_seen" in log and "store-down at image 32" in log
    from ncsn.tracking.client import client_at

    client = client_at(jobs.nodes.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("ncsn")
    (tracked,) = client.search_runs([experiment.experiment_id], f"tags.`ray.submission_id` = '{name}'")
    assert tracked.info.run_name == "train" and tracked.info.status == "FINISHED"


@slow
def test_a_failure_is_one_line_and_does_not_block_the_next_attempt(jobs: Jobs) -> None:
    marker = jobs.folder / "mended"
    code = (
        f"import pathlib, sys\nprint('looking', flush=True)\nif not pathlib.Path({str(marker)!r}).exists():\n"
        "    raise ValueError('no such data')\nprint('fine')"
    )
    first = jobs.launch("again", code)
    said = ended(first).splitlines()
    assert first.returncode == 1
    (job,) = jobs.of("again")
    name = job["submission_id"]
    uri = jobs.folder / "runs/again/steps/train/driver.log"
    assert re.fullmatch(
        rf"RemoteFailure: .*{name} .*exit code 1.*ValueError: no such data.*{re.escape(str(uri))}", said[-1]
    )
    assert "looking" in said and "looking\n" in jobs.log("again")
    marker.touch()
    second = jobs.launch("again", code)
    assert "fine" in ended(second).splitlines()
    assert second.returncode == 0
    assert [(job["submission_id"], job["status"]) for job in jobs.of("again")] == [
        (name, "FAILED"),
        (f"{name}-2", "SUCCEEDED"),
    ]
    assert jobs.log("again").endswith("looking\nfine\n"), "the log is that of the last attempt"


def waiting(release: Path) -> str:
    """Code that says it works, waits until the file is there, and counts to nine."""
    return (
        "import pathlib, time\nprint('at work', flush=True)\n"
        f"while not pathlib.Path({str(release)!r}).exists(): time.sleep(0.05)\n"
        "for n in range(10): print('line', n, flush=True)"
    )


@slow
def test_launchers_at_once_start_one_job_and_others_are_refused(jobs: Jobs) -> None:
    release = jobs.folder / "release"
    both = [jobs.launch("shared", waiting(release)) for _ in range(2)]
    for launcher in both:
        until(launcher, "at work")
    other = jobs.launch("shared", "print('something else')")
    (job,) = jobs.of("shared")
    refusal = ended(other).splitlines()[-1]
    assert refusal.startswith(f"UserError: {job['submission_id']}: ")
    assert f"ray job stop {job['submission_id']} --address {jobs.nodes.dashboard}" in refusal
    release.touch()
    for launcher in both:
        assert [line for line in ended(launcher).splitlines() if line.startswith("line")] == [
            f"line {n}" for n in range(10)
        ]
        assert launcher.returncode == 0
    assert [job["status"] for job in jobs.of("shared")] == ["SUCCEEDED"]


@slow
def test_the_log_survives_a_broken_connection(jobs: Jobs) -> None:
    release = jobs.folder / "restored"
    with TcpProxy(jobs.nodes.dashboard) as proxy:
        launcher = jobs.launch("cut", waiting(release), address=proxy.url)
        until(launcher, "at work")
        proxy.cut()
        time.sleep(3)
        proxy.restore()
        release.touch()
        said = ended(launcher).splitlines()
    assert launcher.returncode == 0, said
    assert [line for line in said if line.startswith("line") or line == "at work"] == [f"line {n}" for n in range(10)]
    assert jobs.log("cut").endswith("".join(["at work\n", *(f"line {n}\n" for n in range(10))]))
    assert any("is unavailable" in line for line in said)
    assert len(jobs.of("cut")) == 1


@slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_job(jobs: Jobs, config: Path, number: signal.Signals, code: int) -> None:
    """The driver has time to say so, and the same command goes on where it was."""
    settings = from_yaml(config.read_text(), overrides=["train.num_images=100000000"])
    run = f"stopped-{code}"
    dataset = ingest.run(settings, run=run).uri
    arguments = ["train", "--config", str(config), "--set", "train.num_images=100000000", "--run", run]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "ncsn", *arguments, "--dataset", dataset, "--address", jobs.nodes.dashboard],
        env=jobs.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stderr is not None
    checkpoints = f"{settings.storage.root}/runs/{run}/checkpoints"
    for line in launcher.stderr:
        if "images" in line and any(name.startswith("images-") for name in storage.list_names(checkpoints)):
            break
    launcher.send_signal(number)
    said = ended(launcher)
    assert launcher.returncode == code, said
    deadline = time.monotonic() + 60
    while jobs.of(run)[0]["status"] == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert [job["status"] for job in jobs.of(run)] == ["STOPPED"]


@slow
def test_plain_ray_job_submit_trains_from_a_config_in_s3(jobs: Jobs, config: Path, s3_root: str) -> None:
    """`ray job submit -- ncsn train --config s3://...`: nothing but Ray's own command and the installed package."""
    settings = from_yaml(config.read_text())
    ingest.run(settings, run="plain")
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
    result = json.loads(storage.read_text(f"{s3_root}/runs/plain/steps/train/result.json"))["result"]
    assert result["images_seen"] == 160


@slow
def test_a_search_its_best_and_scored_samples_run_as_jobs(jobs: Jobs, config: Path) -> None:
    """What the search leaves in the store is trained and sampled there; the score comes back while images are made."""
    from ncsn.tracking.client import client_at

    root = from_yaml(config.read_text()).storage.root
    dataset = ingest.run(from_yaml(config.read_text()), run="sought").uri

    def job(step: str, config_uri: str, run: str, *options: str) -> dict[str, Any]:
        place = ("--address", jobs.nodes.dashboard, "--json")
        done = jobs.ncsn(step, "--config", config_uri, "--run", run, *options, *place)
        assert done.returncode == 0, done.stderr
        assert re.search(rf"Ray job ncsn-{run}-{step}-[0-9a-f]{{8}}: SUCCEEDED", done.stderr), done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    search = "search={num_trials: 3, num_samples: 20, first_rung_images: 64, reduction_factor: 3}"
    found = job("tune", str(config), "sought", "--set", search)
    assert found["config"] == f"{root}/runs/sought/search/best.yaml"
    assert [row["trial"] for row in found["trials"]] == [0, 1, 2]
    assert found["objective"] <= found["baseline"]
    trained = job("train", found["config"], "sought-best", "--dataset", dataset)
    assert trained["images_seen"] == 160
    best = from_yaml(storage.read_text(f"{trained['checkpoint']}/config.yaml"))
    assert (best.noise.sigma_1, best.sampling.sampler.model_dump()) == (
        found["values"]["noise.sigma_1"],
        found["sampler"],
    )
    job("sample", found["config"], "sought-best", "--score", dataset)
    progress = json.loads(storage.read_text(f"{root}/runs/sought-best/steps/sample/progress.json"))
    assert re.fullmatch(r"FID \S+ \u00b1 \S+ \(95 %\) of 8", progress["note"])
    client = client_at(jobs.nodes.environment["MLFLOW_TRACKING_URI"])
    (experiment,) = client.search_experiments(filter_string="name = 'ncsn'")
    runs = client.search_runs([experiment.experiment_id])
    (sampled,) = [run for run in runs if "sample/running_classifier_fid" in run.data.metrics]
    assert f"{sampled.data.metrics['sample/running_classifier_fid']:.4g}" == progress["note"].split()[1]
    (tuned,) = [run for run in runs if run.data.tags.get("ncsn.step") == "tune"]
    assert sum(run.data.tags.get("mlflow.parentRunId") == tuned.info.run_id for run in runs) == 3


@slow
def test_a_cluster_without_the_command_is_named(jobs: Jobs) -> None:
    launcher = jobs.launch("bare", "", command=("ncsn-of-another-name", "train"))
    (failure,) = [line for line in ended(launcher).splitlines() if line.startswith("RemoteFailure: ")]
    (job,) = jobs.of("bare")
    assert job["submission_id"] in failure and "`ncsn`" in failure


@slow
def test_another_python_is_refused_by_the_driver(jobs: Jobs, config: Path) -> None:
    """Nothing but the driver knows the cluster's Python, so it compares, and its mistake comes back as ours."""
    run = "python"
    ingest.run(from_yaml(config.read_text()), run=run)
    pretend = "import runpy, ncsn.process as l; l.python_version = lambda: '3.9'; "
    code = f"{pretend}runpy.run_module('ncsn', run_name='__main__', alter_sys=True)"
    arguments = ["train", "--config", str(config), "--run", run, "--address", jobs.nodes.dashboard]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=jobs.environment, capture_output=True, text=True, check=False
    )
    here = ".".join(map(str, sys.version_info[:2]))
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: Python: ")
    assert here in error and "3.9" in error


@pytest.fixture
def other_ray() -> Iterator[str]:
    """A dashboard of Ray 2.99, of which only the version is played."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"version": "4", "ray_version": "2.99.0"}).encode())

        def log_message(self, *_args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def open_api(address: str, **variables: str) -> str:
    """Open the API in a process of its own; the error."""
    code = "import sys; from ncsn.remote.jobs_api import JobsApi; JobsApi(sys.argv[1] or None, patience=1)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")} | variables
    done = subprocess.run(
        [sys.executable, "-c", code, address], env=environment, capture_output=True, text=True, check=False
    )
    return done.stderr.splitlines()[-1]


def test_another_ray_is_refused(other_ray: str) -> None:
    # The environment does not override what is asked for, as it does with Ray's own client.
    error = open_api(other_ray, RAY_ADDRESS="http://127.0.0.1:9", RAY_AUTH_MODE="disabled")
    assert error.startswith(f"ncsn.errors.UserError: {other_ray}: ")
    assert "ray==2.99.0" in error


@slow
@pytest.mark.parametrize(
    ("address", "variables", "kind", "subject"),
    [
        ("", {}, "ncsn.errors.UserError", "compute.ray_jobs.address: "),
        ("head:8265", {}, "ncsn.errors.UserError", "compute.ray_jobs.address = 'head:8265': "),
        ("", {"RAY_ADDRESS": "head:6379"}, "ncsn.errors.UserError", "RAY_ADDRESS = 'head:6379': "),
        ("http://127.0.0.1:9", {}, "ConnectionError", "http://127.0.0.1:9 "),
        ("DASHBOARD", {}, "PermissionError", "RAY_AUTH_TOKEN"),
        ("DASHBOARD", {"RAY_AUTH_TOKEN": "f" * 64}, "PermissionError", "RAY_AUTH_TOKEN"),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_said_in_one_line(
    jobs: Jobs, address: str, variables: dict[str, str], kind: str, subject: str, tmp_path: Path
) -> None:
    error = open_api(address.replace("DASHBOARD", jobs.nodes.dashboard), HOME=str(tmp_path), **variables)
    assert error.startswith(f"{kind}: ")
    assert subject in error


@slow
def test_a_token_in_a_file_is_enough(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(jobs.nodes.token)
    code = f"from ncsn.remote.jobs_api import JobsApi; JobsApi({jobs.nodes.dashboard!r}); raise SystemExit('it is')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "it is"


@slow
def test_doctor_and_finish_know_the_cluster(jobs: Jobs, config: Path) -> None:
    release = jobs.folder / "never"
    launcher = jobs.launch("left", waiting(release))
    until(launcher, "at work")
    found = json.loads(jobs.ncsn("doctor", "--config", str(config), "--address", jobs.nodes.dashboard, "--json").stdout)
    (finding,) = [each for each in found if each["check"] == "ray jobs"]
    assert finding["state"] == "ok" and "1 jobs" in finding["detail"], finding
    stop = "from ncsn.remote.ray_jobs import RayJobs; from ncsn.config.compute import ComputeConfig; print(RayJobs("
    stop += f"ComputeConfig(ray_jobs={{'address': {jobs.nodes.dashboard!r}}})).stop_all('left'))"
    done = subprocess.run(
        [sys.executable, "-c", stop], env=jobs.environment, capture_output=True, text=True, check=False
    )
    (job,) = jobs.of("left")
    assert done.stdout.strip() == str([job["submission_id"]]), done.stderr
    assert f"RemoteFailure: Ray job {job['submission_id']} was stopped" in ended(launcher)
