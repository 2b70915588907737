"""An emulated API server, which the kubeconfig of the environment names: a test says what an operator would do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_api import ApiServer, Cluster, Resource, rules_of
from ray_nodes import RayNodes
from remote_places import Launched
from s3_server import S3Server

from ncsn.config.compute import ComputeConfig
from ncsn.remote import backend, kuberay, pods
from ncsn.remote.backend import RemoteLost, RemoteStep
from ncsn.remote.kuberay import KubeRay
from ncsn.storage import heartbeat

BASE = Path(__file__).parents[2] / "infra" / "base"
ROLE, NOTES = BASE / "rbac" / "launcher-role.yaml", BASE / "janitor" / "notes.yaml"


@dataclass
class Emulation:
    """The cluster, and a step to run on it."""

    cluster: Cluster
    folder: Path

    def step(self, work: str = "") -> RemoteStep:
        return RemoteStep(str(self.folder), "mine", "train", ("ncsn", "train", work))

    def execute(self, *, meanwhile: Callable[[], object] = lambda: None, **compute: Any) -> None:
        """Run the step as a RayJob, in this process, and something beside it, with whose failure the RayJob goes."""

        def work() -> None:
            try:
                meanwhile()
            except BaseException:
                self.cluster.away = False
                self.cluster.delete("rayjobs", self.step().job_name)
                raise

        settings = ComputeConfig.model_validate(compute)
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(work)
            try:
                KubeRay(settings).execute(self.step())
            except RemoteLost as lost:
                raise beside.exception() or lost from None
            beside.result()

    def launch(self, work: str = "") -> Launched:
        """Run the step as a RayJob, from another process."""
        step = json.dumps({key: value for key, value in vars(self.step(work)).items() if not callable(value)})
        return Launched('{"backend": "kuberay"}', step, env=dict(os.environ))

    @property
    def jobs(self) -> list[Resource]:
        return self.cluster.list("rayjobs")

    def set_status(self, deployment: str, job: str = "", **more: Any) -> None:
        """That of the RayJobs that there are."""
        status = {"jobDeploymentStatus": deployment, "jobStatus": job, **more}
        for each in self.jobs:
            self.cluster.update("rayjobs", each["metadata"]["name"], lambda rayjob: rayjob.update(status=status))

    def add_pod(self, name: str, *, log: Iterable[str] = (), attempt: str = "", **labels: str) -> None:
        """One that runs, of the RayJob that there is, with the lines of its log."""
        (job,) = self.jobs
        labels |= {"ncsn.dev/attempt": attempt or job["metadata"]["labels"]["ncsn.dev/attempt"]}
        container = {"name": "main", "image": "ours:1", "state": {"running": {}}, "restartCount": 0}
        status = {"phase": "Running", "containerStatuses": [container]}
        self.cluster.logs[name] = []
        self.write_log(name, *log)
        self.cluster.create("pods", {"metadata": {"name": name, "labels": labels}, "status": status})

    def add_submitter(self, name: str = "submitter", **more: Any) -> None:
        self.add_pod(name, **more, **{"job-name": self.step().job_name})

    def write_log(self, pod: str, *lines: str) -> None:
        for line in lines:
            now = time.time_ns()
            stamp = datetime.fromtimestamp(now // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
            self.cluster.logs[pod].append(f"{stamp}.{now % 10**9:09d}Z {line}\n".encode())

    @property
    def log(self) -> str:
        return Path(self.step().log).read_text()


@pytest.fixture
def emulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    """A RayJob runs as soon as it is created, until the test says otherwise."""
    cluster = Cluster(rules=rules_of(ROLE))
    cluster.create("configmaps", yaml.safe_load(NOTES.read_text()))
    server, emulation = ApiServer(cluster), Emulation(cluster, tmp_path)
    cluster.on_create = lambda _: emulation.set_status("Running", "RUNNING")
    server.write_kubeconfig(tmp_path / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("NCSN_IMAGE", "registry.example/ncsn-python:0.1.0")
    monkeypatch.setattr(backend, "_LAST_READ_SECONDS", 120.0)  # of a log, on a busy machine
    monkeypatch.setattr(backend, "_LOG_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(kuberay, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(kuberay, "LOOK_SECONDS", (0.1, 0.1))
    for name in ("KFP_POD_NAME", "NCSN_RAYJOB_TEMPLATE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield emulation
    server.close()


@pytest.fixture(scope="session")
def ray_head(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """One Ray cluster with a token and a dashboard, whose processes have an S3 store and a tracking database."""
    folder = tmp_path_factory.mktemp("head")
    database = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    with RayNodes(folder, count=1, cpus=2, environment=s3_server.environment | database) as nodes:
        yield nodes


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a RayJob's launcher in this process says, as it says it: capsys may lose what is said while it is read."""
    lines: list[str] = []
    for module in (backend, kuberay, pods):
        monkeypatch.setattr(module, "say", lambda line, **_: lines.append(line))
    return lines


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Wait until a condition holds; fail if it never does."""

    def wait(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
        ends = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < ends, f"waited in vain until {what}"
            time.sleep(0.02)

    return wait
