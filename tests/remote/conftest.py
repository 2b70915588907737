"""An emulated cluster with KubeRay, which the kubeconfig of the environment names."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay_operator import Operator
from kubernetes_api import ApiServer, Cluster, rules_of
from ray_nodes import RayNodes
from remote_places import Launched
from s3_server import S3Server

from ncsn.config.compute import ComputeConfig
from ncsn.remote import backend, kuberay, pods
from ncsn.remote.backend import RemoteStep
from ncsn.remote.kuberay import KubeRay

BASE = Path(__file__).parents[2] / "infra" / "base"
ROLE, NOTES = BASE / "rbac" / "launcher-role.yaml", BASE / "janitor" / "notes.yaml"


@dataclass
class Emulation:
    """The cluster, its operator, and a step to run on it."""

    cluster: Cluster
    operator: Operator
    server: ApiServer
    folder: Path

    def step(self, code: str, **changes: Any) -> RemoteStep:
        """A step whose entrypoint is Python code."""
        uri = self.folder / "runs" / "mine" / "steps" / "train"
        return replace(RemoteStep(run="mine", step="train", uri=str(uri), command=("python", "-c", code)), **changes)

    def execute(
        self, code: str, *, meanwhile: Callable[[], object] = lambda: None, patience: float = 60, **compute: Any
    ) -> None:
        """Run the code as a RayJob, in this process, and something beside it."""
        settings = ComputeConfig.model_validate(compute)
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(meanwhile)
            KubeRay(settings, patience=patience, renew_seconds=0.2).execute(self.step(code))
            beside.result()

    def execute_until(self, condition: Callable[[], object]) -> None:
        """Run a RayJob, in this process, that ends when the condition holds."""
        go = self.folder / "go-on"

        def release() -> None:
            ends = time.monotonic() + 60
            while not condition() and time.monotonic() < ends:
                time.sleep(0.02)
            go.touch()

        waiting = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)"
        self.execute(waiting, meanwhile=release)
        assert condition()

    def launch(self, code: str) -> Launched:
        """Run the code as a RayJob, from another process."""
        step = json.dumps({key: value for key, value in vars(self.step(code)).items() if not callable(value)})
        return Launched('{"backend": "kuberay"}', step, env=dict(os.environ))

    @property
    def jobs(self) -> list[dict[str, Any]]:
        return self.cluster.list("rayjobs")

    @property
    def log(self) -> str:
        return (self.folder / "runs/mine/steps/train/log.txt").read_text()


@pytest.fixture
def emulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    cluster = Cluster(rules=rules_of(ROLE))
    cluster.create("configmaps", yaml.safe_load(NOTES.read_text()))
    server, operator = ApiServer(cluster), Operator(cluster)
    server.write_kubeconfig(tmp_path / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("NCSN_IMAGE", "registry.example/ncsn-python:0.1.0")
    monkeypatch.setattr(backend, "_LAST_READ_SECONDS", 120.0)  # of a log, on a busy machine
    monkeypatch.setattr(backend, "_LOG_SECONDS", 0.1)
    monkeypatch.setattr(kuberay, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(kuberay, "LOOK_SECONDS", (0.1, 0.1))
    for name in ("KFP_POD_NAME", "NCSN_RAYJOB_TEMPLATE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield Emulation(cluster, operator, server, tmp_path)
    cluster.away = False
    operator.close()
    server.close()
    assert cluster.list("rayjobs") == [] and cluster.list("pods") == []


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
