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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from do import do
from edited_clone import SAYS, clone
from launched import TINY, Launched
from ports import TcpProxy
from ray_nodes import RayNodes

from ncsn import storage
from ncsn.config import from_yaml
from ncsn.environment import CODE
from ncsn.tracking.client import client_at

pytestmark = pytest.mark.timeout(900)
slow = pytest.mark.slow
COUNTED = [f"line {n}" for n in range(10)]


@dataclass
class RayHead:
    """A job server behind a proxy that can be cut, and steps whose command is Python code."""

    folder: Path
    nodes: RayNodes
    proxy: TcpProxy

    @property
    def compute(self) -> str:
        return json.dumps({"backend": "ray-jobs", "ray_jobs": {"address": self.proxy.url}})

    def launch(self, run: str, code: str, **changes: Any) -> Launched:
        step = {"root": str(self.folder), "run": run, "step": "train", "command": ("python", "-c", code)}
        return Launched(self.compute, json.dumps(step | changes), env=self.environment)

    def stop(self, run: str) -> list[str]:
        stopping = Launched(self.compute, "null", run, env=self.environment)
        out, err = stopping.communicate(timeout=240)
        assert stopping.returncode == 0, err
        names: list[str] = json.loads(out)
        return names

    def step_folder(self, run: str) -> Path:
        return self.folder / "runs" / run / "steps" / "train"

    def log(self, run: str) -> str:
        return (self.step_folder(run) / "log.txt").read_text()

    @property
    def environment(self) -> dict[str, str]:
        """As a user has it: the token, and no mode and no address."""
        return {name: text for name, text in self.nodes.client.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}

    def ncsn(self, *args: str, code: str = "") -> subprocess.CompletedProcess[str]:
        """The command as a user has it."""
        command = [sys.executable, *(["-c", code] if code else ["-m", "ncsn"]), *args]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

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

    def lose(self, run: str) -> None:
        """Ray forgets a job that has ended only, so the launcher does not see it end."""
        (name,) = self.running(run)
        with self.outage():
            self.nodes.get(f"/api/jobs/{name}/stop", method="POST")
            while self.running(run):
                time.sleep(0.2)
            time.sleep(3)  # Ray's monitor of the job must have ended, else it writes a status once more
            self.nodes.get(f"/api/jobs/{name}", method="DELETE")


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


def tracked(jobs: RayHead, name: str) -> Any:
    """The MLflow run of a job."""
    client = client_at(jobs.nodes.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("ncsn")
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`ray.submission_id` = '{name}'")
    return found


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
    mlflow_run = tracked(jobs, name)
    assert mlflow_run.info.run_name == "train" and mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.tags["ray.dashboard_url"] == jobs.nodes.dashboard


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
    tags = tracked(jobs, job["submission_id"]).data.tags
    assert (tags["ncsn.code.uri"], tags["mlflow.source.git.dirty"]) == (uri, "true")
    assert len(tags["mlflow.source.git.commit"]) == 40

    jobs.nodes.get("/api/jobs/")  # the cluster is well
    again = jobs.ncsn(*arguments, "--code", f"{uri.removesuffix('.zip')}-not.zip")
    assert again.returncode == 2, again.stderr


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


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """A name that no other test has: one Ray head serves them all."""
    return re.sub(r"[^a-z]+", "-", request.node.originalname.removeprefix("test_"))[:24].strip("-")


def waiting(release: Path) -> str:
    """Code that says it runs, waits until the file is there, and counts to nine."""
    return (
        "import pathlib, time\nprint('running', flush=True)\n"
        f"while not pathlib.Path({str(release)!r}).exists(): time.sleep(0.05)\n"
        "for n in range(10): print('line', n, flush=True)"
    )


@slow
def test_another_attempt_adopts_what_a_killed_launcher_left(jobs: RayHead, run: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    first = jobs.launch(run, waiting(go))
    first.until("running")
    first.kill()
    first.communicate()
    second = jobs.launch(run, waiting(go))
    second.until("running")
    go.touch()
    assert second.ended() == 0, second.said
    assert len(jobs.of(run)) == 1
    assert jobs.log(run).splitlines()[-11:] == ["running", *COUNTED]


@slow
def test_launchers_at_once_start_one_job_and_other_work_is_refused(jobs: RayHead, run: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    launchers = [jobs.launch(run, waiting(go)) for _ in range(2)]
    for launcher in launchers:
        launcher.until("running")
    (name,) = jobs.running(run)
    assert re.fullmatch(rf"ncsn-{run}-train-[0-9a-f]{{8}}", name)
    other = jobs.launch(run, "print('something else')")
    assert other.ended() == 1
    assert other.said[-1].startswith(f"UserError: {name}: ")
    assert jobs.running(run) == [name]
    go.touch()
    for launcher in launchers:
        assert launcher.ended() == 0, launcher.said
        assert [line for line in launcher.said if line.startswith("line")] == COUNTED
    assert jobs.log(run).splitlines()[-10:] == COUNTED
    assert len(jobs.of(run)) == 1


@slow
def test_a_failure_is_one_line_and_does_not_block_the_next_attempt(jobs: RayHead, run: str, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    code = (
        f"import pathlib\nprint('starting', flush=True)\nif not pathlib.Path({str(fixed)!r}).exists():\n"
        "    raise ValueError('no such data')\nprint('done')"
    )
    first = jobs.launch(run, code)
    assert first.ended() == 1
    kind, failure = first.said[-1].split(": ", 1)
    assert kind == "RemoteFailure"
    assert re.search(rf"ncsn-{run}-train-\w{{8}} .*ValueError: no such data; log {jobs.step_folder(run)}", failure)
    before = len(jobs.of(run))
    fixed.touch()
    second = jobs.launch(run, code)
    assert second.ended() == 0, second.said
    assert len(jobs.of(run)) == before + 1
    assert jobs.log(run).splitlines()[-2:] == ["starting", "done"]
    assert "Traceback" not in jobs.log(run), "the log is that of the last attempt"


@slow
def test_an_outage_stops_nothing_and_the_log_is_shown_once_and_whole(
    jobs: RayHead, run: str, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    go = tmp_path / "go"
    launcher = jobs.launch(run, waiting(go))
    launcher.until("running")
    (lease,) = (jobs.step_folder(run) / "lease").glob("[!.]*")
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
def test_only_the_launcher_that_made_it_stops_a_ray_job(
    jobs: RayHead, run: str, tmp_path: Path, eventually: Callable[..., None], number: signal.Signals
) -> None:
    run, code = f"{run[:18]}-{number:d}", 128 + number
    first, second = (jobs.launch(run, waiting(tmp_path / "never")) for _ in range(2))
    for launcher in (first, second):
        launcher.until("running")
    made, attached = (first, second) if any(" submitted " in line for line in first.said) else (second, first)
    attached.send_signal(number)
    assert attached.ended() in (code, -number), attached.said
    assert len(jobs.running(run)) == 1
    made.send_signal(number)
    assert made.ended() in (code, -number), made.said
    eventually(lambda: not jobs.running(run), "the job has ended")


@slow
def test_stop_ends_the_jobs_of_a_run(jobs: RayHead, run: str, tmp_path: Path) -> None:
    launcher = jobs.launch(run, waiting(tmp_path / "never"))
    launcher.until("running")
    names = jobs.running(run)
    assert jobs.stop("another") == []
    assert jobs.stop(run) == names
    assert launcher.ended() == 1
    assert re.match(rf"Remote(Failure|Lost): \w+( job)? {names[0]} was ", launcher.said[-1])
    assert jobs.stop(run) == []


@slow
def test_a_job_that_is_gone_is_lost(jobs: RayHead, run: str, tmp_path: Path) -> None:
    launcher = jobs.launch(run, waiting(tmp_path / "never"))
    launcher.until("running")
    jobs.lose(run)
    assert launcher.ended() == 1
    assert launcher.said[-1].startswith("RemoteLost: ")
