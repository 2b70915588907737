"""A step as a RayJob on the emulated API: a test says what becomes of it, in statuses that a real operator has set."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_api import Cluster, Resource, served
from launched import Launched

from ncsn.config.compute import ComputeConfig
from ncsn.remote import backend, kuberay
from ncsn.remote.backend import RemoteLost, RemoteStep
from ncsn.remote.kuberay import KubeRay
from ncsn.remote.manifest import render
from ncsn.storage import heartbeat

BASE = Path(__file__).parents[2] / "infra" / "base"
LAUNCHER, JANITOR = (
    yaml.safe_load((BASE / name).read_text())["rules"] for name in ("rbac/launcher-role.yaml", "janitor/role.yaml")
)
IMAGE = "registry.example/ncsn-python:0.1.0"
_, RECORDED, READ = json.loads(Path(__file__).with_name("rayjob_statuses.json").read_text()).values()
STATUSES: dict[str, dict[str, Any]] = RECORDED | READ


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

        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(work)
            try:
                KubeRay(ComputeConfig.model_validate(compute)).execute(self.step(), lambda: None)
            except RemoteLost as lost:
                raise beside.exception() or lost from None
            beside.result()

    def launch(self) -> Launched:
        """Run the step as a RayJob, from another process, until one is created or found."""
        step = json.dumps({key: value for key, value in vars(self.step()).items() if not callable(value)})
        launcher = Launched('{"backend": "kuberay"}', step, env=dict(os.environ))
        launcher.until("RayJob .* created .*|attached to RayJob .*")
        return launcher

    def add_another_launchers(self, *, work: str = "", silent: float = 0) -> None:
        """A RayJob of the step, whose launcher renewed its lease `silent` seconds ago."""
        labels = {"ncsn.dev/attempt": "another"}
        rayjob = render(self.step(work), ComputeConfig(), namespace="kubeflow", image=IMAGE, env={}, labels=labels)
        self.cluster.create("rayjobs", rayjob)
        lease = Path(self.step().lease, "another")
        lease.parent.mkdir(parents=True, exist_ok=True)
        lease.touch()
        os.utime(lease, (time.time() - silent,) * 2)

    @property
    def jobs(self) -> list[Resource]:
        return self.cluster.list("rayjobs")

    def reach(self, status: str) -> None:
        """Let the RayJobs that there are have a status of this name."""
        for each in self.jobs:
            name = each["metadata"]["name"]
            self.cluster.update("rayjobs", name, lambda rayjob: rayjob.update(status=STATUSES[status]))

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

    def add_head(self, *, log: Iterable[str] = (), **status: Any) -> None:
        """One with this state of its container, or of the whole pod."""
        self.add_pod("head", log=log, **{"ray.io/node-type": "head", "ray.io/cluster": "mine-kv5g6"})
        self.cluster.update("pods", "head", lambda pod: pod["status"].update(status))

    def add_task_pod(self, task: str, *, run_id: str, **status: Any) -> None:
        """The pod of a task of a pipeline run, named as by KFP 2.17.0 on Argo 4.0.5."""
        node = f"ncsn-train-sd9mr(0).root(0).exit-handler-1(0).{task}(0).executor(0)"
        annotations = {"workflows.argoproj.io/node-name": node}
        metadata = {"name": f"impl-{task}", "labels": {"pipeline/runid": run_id}, "annotations": annotations}
        spec = {"containers": [{"name": "main", "image": IMAGE}]}
        self.cluster.create("pods", {"metadata": metadata, "spec": spec, "status": status})

    def write_log(self, pod: str, *lines: str) -> None:
        for line in lines:
            now = time.time_ns()
            stamp = datetime.fromtimestamp(now // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
            self.cluster.logs[pod].append(f"{stamp}.{now % 10**9:09d}Z {line}\n".encode())

    @property
    def log(self) -> str:
        return Path(self.step().log).read_text()


@contextmanager
def emulated(folder: Path) -> Iterator[Emulation]:
    """A cluster that the kubeconfig of the environment names. A RayJob runs as soon as it is created."""
    cluster = Cluster(rules=LAUNCHER)
    cluster.create("configmaps", yaml.safe_load((BASE / "janitor" / "notes.yaml").read_text()))
    emulation = Emulation(cluster, folder)
    cluster.on_create = lambda _: emulation.reach("runs")
    with served(cluster) as kubeconfig, pytest.MonkeyPatch.context() as patch:
        (folder / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
        patch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
        patch.setenv("NCSN_IMAGE", IMAGE)
        patch.setattr(backend, "_LAST_READ_SECONDS", 120.0)  # of a log, on a busy machine
        patch.setattr(backend, "_LOG_SECONDS", 0.1)
        patch.setattr(heartbeat, "RENEW_SECONDS", 0.2)
        patch.setattr(kuberay, "POLL_SECONDS", 0.02)
        patch.setattr(kuberay, "LOOK_SECONDS", (0.1, 0.1))
        for name in ("KFP_POD_NAME", "NCSN_RAYJOB_TEMPLATE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            patch.delenv(name, raising=False)
        yield emulation
