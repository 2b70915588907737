"""Steps as jobs on a real Ray cluster with a token, through its dashboard: train, attach, refuse, stop, lose.

Launchers are processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from do import do
from edited_clone import SAYS, clone
from launched import TINY, Launched
from ports import TcpProxy
from ray_nodes import RayNodes
from s3_server import S3Server

from ncsn import storage
from ncsn.config import Config, from_yaml
from ncsn.environment import CODE
from ncsn.runs.code import PYTHON, python_version
from ncsn.tracking.client import client_at

pytestmark = pytest.mark.timeout(900)
slow = pytest.mark.slow
COUNTED = [f"line {n}" for n in range(10)]


@dataclass
class RayHead:
    """A job server behind a proxy that can be cut."""

    folder: Path
    nodes: RayNodes
    proxy: TcpProxy

    def launch(self, run: str, *command: str) -> Launched:
        compute = {"backend": "ray-jobs", "ray_jobs": {"address": self.proxy.url}}
        step = {"root": str(self.folder), "run": run, "step": "train", "command": command}
        return Launched(json.dumps(compute), json.dumps(step), env=self.environment)

    def step_folder(self, run: str) -> Path:
        return self.folder / "runs" / run / "steps" / "train"

    def log(self, run: str) -> str:
        return (self.step_folder(run) / "log.txt").read_text()

    @property
    def environment(self) -> dict[str, str]:
        """As a user has it: the token, and no mode and no address."""
        return {name: text for name, text in self.nodes.client.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}

    def of(self, run: str) -> list[dict[str, Any]]:
        mine = [job for job in self.nodes.get("/api/jobs/") if (job["metadata"] or {}).get("ncsn.run") == run]
        return sorted(mine, key=lambda job: job["start_time"])

    def running(self, run: str) -> list[str]:
        return [job["submission_id"] for job in self.of(run) if job["status"] in ("PENDING", "RUNNING")]

    @contextmanager
    def outage(self) -> Iterator[None]:
        self.proxy.cut()
        yield
        self.proxy.restore()


@pytest.fixture(scope="module")
def ray_head(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """One Ray cluster with a token and a dashboard, whose processes have an S3 store and a tracking database."""
    folder = tmp_path_factory.mktemp("head")
    database = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    with RayNodes(folder, count=1, cpus=2, environment=s3_server.environment | database) as nodes:
        yield nodes


@pytest.fixture
def jobs(ray_head: RayNodes, tmp_path: Path) -> Iterator[RayHead]:
    with TcpProxy(ray_head.dashboard) as proxy:
        yield RayHead(tmp_path, ray_head, proxy)


@pytest.fixture
def settings(ray_head: RayNodes, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The tiny experiment, with its store and its file in S3; this process has the tracking server of the cluster."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ray_head.environment["MLFLOW_TRACKING_URI"])
    storage.write_text(f"{s3_root}/tiny.yaml", TINY.format(root=s3_root))
    return from_yaml(TINY.format(root=s3_root))


def tracked(jobs: RayHead, name: str) -> Any:
    """The MLflow run of a job."""
    client = client_at(jobs.nodes.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("ncsn")
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`ray.submission_id` = '{name}'")
    return found


def test_training_runs_as_a_job(jobs: RayHead, settings: Config) -> None:
    do("ingest", settings, "mine")
    command = [sys.executable, "-m", "ncsn", "train", "--config", f"{settings.storage.root}/tiny.yaml", "--run", "mine"]
    command += ["--address", jobs.nodes.dashboard, "--json"]
    done = subprocess.run(command, env=jobs.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["images_seen"] == 320
    assert storage.exists(f"{result['checkpoint']}/config.yaml")
    (job,) = jobs.of("mine")
    name = job["submission_id"]
    assert re.fullmatch(r"ncsn-mine-train-[0-9a-f]{8}", name)
    step, known = f"{settings.storage.root}/runs/mine/steps/train", job["metadata"]
    assert set(storage.list_names(step)) == {"attempt.json", "result.json", "progress.json", "lease", "log.txt"}
    assert (known["mlflow.experiment"], known["mlflow.run_name"]) == ("ncsn", "mine/train")
    assert known[PYTHON] == python_version()
    assert job["runtime_env"]["env_vars"].keys() == {"MLFLOW_TRACKING_URI", "RAY_JOB_STOP_WAIT_TIME_S"}
    assert f"Ray job {name}: SUCCEEDED" in done.stderr
    assert storage.list_names(f"{step}/lease/{known['ncsn.request']}") == [], "its launcher has ended"
    assert "images_seen" in storage.read_text(f"{step}/log.txt")
    mlflow_run = tracked(jobs, name)
    assert mlflow_run.info.run_name == "train" and mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.tags["ray.dashboard_url"] == jobs.nodes.dashboard


@slow
def test_driver_and_worker_run_the_edited_code_of_a_clone(jobs: RayHead, settings: Config, tmp_path: Path) -> None:
    """Ray has no trace of the clone but what the job client uploads."""
    do("ingest", settings, "edited")
    edited = clone(tmp_path / "clone")
    edited.edit("ncsn/training/loop.py")
    arguments = ("train", "--config", f"{settings.storage.root}/tiny.yaml", "--run", "edited", "--code", "here")
    done = edited.ncsn(*arguments, "--address", jobs.nodes.dashboard, env=jobs.environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.endswith(SAYS)]
    assert {line == SAYS for line in said} == {True, False}, "a worker's and the driver's"
    (job,) = jobs.of("edited")
    assert len(job["runtime_env"]["py_modules"]) == 3
    tags = tracked(jobs, job["submission_id"]).data.tags
    assert tags["ncsn.code.uri"] == job["runtime_env"]["env_vars"][CODE]
    assert tags["mlflow.source.git.dirty"] == "true" and len(tags["mlflow.source.git.commit"]) == 40


@slow
def test_a_cluster_without_the_command_is_named(jobs: RayHead) -> None:
    launcher = jobs.launch("bare", "ncsn-of-another-name", "train")
    assert launcher.ended() == 1
    (failure,) = [line for line in launcher.said if line.startswith("RemoteFailure: ")]
    (job,) = jobs.of("bare")
    assert job["submission_id"] in failure and "`ncsn`" in failure


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


def waiting(release: Path) -> tuple[str, ...]:
    """A command that says it runs, waits until the file is there, and counts to nine."""
    code = (
        "import pathlib, time\nprint('running', flush=True)\n"
        f"while not pathlib.Path({str(release)!r}).exists(): time.sleep(0.05)\n"
        "for n in range(10): print('line', n, flush=True)"
    )
    return "python", "-c", code


@slow
def test_launchers_share_one_job_which_outlives_them_and_other_work_is_refused(jobs: RayHead, tmp_path: Path) -> None:
    run = "shared"

    def two_at_once() -> list[Launched]:
        launchers = [jobs.launch(run, *waiting(tmp_path / "go")) for _ in range(2)]
        for launcher in launchers:
            launcher.until("running")
        return launchers

    killed = two_at_once()
    (name,) = jobs.running(run)
    other = jobs.launch(run, "python", "-c", "print('something else')")
    assert other.ended() == 1
    assert other.said[-1].startswith(f"ForeignRun: {name}: ")
    for launcher in killed:
        launcher.kill()
        launcher.communicate()
    adopting = two_at_once()
    (tmp_path / "go").touch()
    for launcher in adopting:
        assert launcher.ended() == 0, launcher.said
        assert [line for line in launcher.said if line.startswith("line")] == COUNTED
    log = jobs.log(run).splitlines()
    assert log[-10:] == COUNTED and "running" in log  # Ray's own first line may come after a job's
    assert len(jobs.of(run)) == 1


@slow
def test_a_failure_is_one_line_and_does_not_block_the_next_attempt(jobs: RayHead, tmp_path: Path) -> None:
    run, fixed = "failing", tmp_path / "fixed"
    code = (
        f"import pathlib\nprint('starting', flush=True)\nif not pathlib.Path({str(fixed)!r}).exists():\n"
        "    raise ValueError('no such data')\nprint('done')"
    )
    first = jobs.launch(run, "python", "-c", code)
    assert first.ended() == 1
    told = rf"RemoteFailure: .*ncsn-{run}-train-\w{{8}} .*ValueError: no such data; log {jobs.step_folder(run)}"
    assert re.match(told, first.said[-1])
    fixed.touch()
    second = jobs.launch(run, "python", "-c", code)
    assert second.ended() == 0, second.said
    assert len(jobs.of(run)) == 2
    assert jobs.log(run).splitlines()[-2:] == ["starting", "done"]
    assert "Traceback" not in jobs.log(run), "the log is that of the last attempt"


@slow
def test_an_outage_stops_nothing_and_the_log_is_shown_once_and_whole(jobs: RayHead, tmp_path: Path, eventually) -> None:
    run, go = "cut", tmp_path / "go"
    launcher = jobs.launch(run, *waiting(go))
    launcher.until("running")
    (lease,) = (jobs.step_folder(run) / "lease").glob("*/[!.]*")
    with jobs.outage():
        launcher.until(".*unavailable.*")
        before = lease.stat().st_mtime_ns
        eventually(lambda: lease.stat().st_mtime_ns != before, "the lease in the store is renewed all the same")
    go.touch()
    assert launcher.ended() == 0, launcher.said
    assert [line for line in launcher.said if line in ("running", *COUNTED)] == ["running", *COUNTED]
    assert jobs.log(run).splitlines()[-11:] == ["running", *COUNTED]
    assert len(jobs.of(run)) == 1


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_last_launcher_stops_a_ray_job_whoever_made_it(jobs: RayHead, tmp_path: Path, eventually, number) -> None:
    run, code = f"told-{number:d}", 128 + number
    first, second = (jobs.launch(run, *waiting(tmp_path / "never")) for _ in range(2))
    for launcher in (first, second):
        launcher.until("running")
    made, attached = (first, second) if any(" submitted " in line for line in first.said) else (second, first)
    made.send_signal(number)
    assert made.ended() in (code, -number), made.said
    assert len(jobs.running(run)) == 1
    attached.send_signal(number)
    assert attached.ended() in (code, -number), attached.said
    eventually(lambda: not jobs.running(run), "the job has ended")


@slow
@pytest.mark.parametrize("forgotten", [False, True], ids=["stopped", "gone"])
def test_a_job_that_is_stopped_or_gone_is_one_line(jobs: RayHead, tmp_path: Path, eventually, forgotten) -> None:
    """Ray forgets a job that has ended only, so the launcher must not see it end."""
    run = f"lost-{forgotten:d}"
    launcher = jobs.launch(run, *waiting(tmp_path / "never"))
    launcher.until("running")
    (name,) = jobs.running(run)
    with jobs.outage() if forgotten else nullcontext():
        jobs.nodes.get(f"/api/jobs/{name}/stop", method="POST")
        eventually(lambda: not jobs.running(run), "the job has ended")
        if forgotten:
            time.sleep(3)  # Ray's monitor of the job must have ended, else it writes a status once more
            jobs.nodes.get(f"/api/jobs/{name}", method="DELETE")
    assert launcher.ended() == 1
    told = "RemoteLost: " if forgotten else f"RemoteFailure: Ray job {name} was stopped"
    assert launcher.said[-1].startswith(told)
