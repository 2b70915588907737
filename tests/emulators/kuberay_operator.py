"""KubeRay's operator behind the emulated API. Leaves out pods of workers, separate nodes, and autoscaling.

A RayJob's entrypoint really runs, as a process of its own with the environment that its pod would have and nothing
else: what the head's container names, and the ConfigMaps and Secrets it refers to. What needs Ray starts its own.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kubernetes_api import Cluster, Refusal, Resource
from ray_nodes import PATIENT_RAY

POLL_SECONDS = 0.02
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
FINALIZER = "ray.io/rayjob-finalizer"

State = Callable[[Resource], tuple[Resource, list[Resource]]]  # from a pod's spec to its status and its events


def running(spec: Resource) -> tuple[Resource, list[Resource]]:
    """All containers run."""
    statuses = [_container(each, {"running": {}}) | {"ready": True} for each in spec["containers"]]
    return {"phase": "Running", "containerStatuses": statuses}, []


def unschedulable(_spec: Resource) -> tuple[Resource, list[Resource]]:
    """No node has room."""
    words = "0/1 nodes are available: 1 Insufficient memory. no new claims to deallocate"
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    return {"phase": "Pending", "conditions": [condition]}, [_warning("FailedScheduling", words)]


def crash_loop(spec: Resource) -> tuple[Resource, list[Resource]]:
    """The container ends again and again."""
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container"}
    (container,) = spec["containers"]
    ended = {"lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}, "restartCount": 3}
    return {"phase": "Running", "containerStatuses": [_container(container, {"waiting": waiting}) | ended]}, []


def _container(container: Resource, state: Resource) -> Resource:
    return {"name": container["name"], "image": container["image"], "state": state, "restartCount": 0, "ready": False}


def _warning(reason: str, message: str) -> Resource:
    return {"type": "Warning", "reason": reason, "message": message}


class Deleted(Exception):
    """The RayJob is being deleted."""


@dataclass
class Operator:
    """Reconciles RayJobs, each in a thread.

    Attributes:
        cluster: The API server's contents.
        references: Name of a ConfigMap or Secret -> its data.
        second: How long a second of a TTL takes here.
        retry_seconds: How long the operator takes to replace a failed cluster.
        admitted: Kueue's answer: a RayJob with a queue waits for it.
        ends: jobStatus that stands in for the real one of a job that ended, with deployment Complete.
        head: State of the head's pod; anything but running stays so.
        seen: Whether somebody has looked at such a head: only then its time to start begins.
        last_words: What the head's container writes before it ends, where it crashes.
        linger: Seconds for which the pods of a deleted RayJob are still there.
        clusters: Names of the RayClusters, one for each attempt.
    """

    cluster: Cluster
    references: dict[str, dict[str, str]] = field(default_factory=dict)
    second: float = 0.02
    retry_seconds: float = 0
    admitted: threading.Event = field(default_factory=threading.Event)
    ends: str | None = None
    head: State = running
    seen: Callable[[], bool] = lambda: True
    last_words: list[str] = field(default_factory=list)
    linger: float = 0
    clusters: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _pods: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cluster.on_create = self._reconcile_in_thread

    def close(self) -> None:
        """Delete the remaining jobs and wait for every thread."""
        for job in self.cluster.list("rayjobs"):
            with suppress(Refusal):
                self.cluster.delete("rayjobs", job["metadata"]["name"])
        for thread in self._threads:
            thread.join(120)

    def _reconcile_in_thread(self, name: str) -> None:
        self.cluster.update("rayjobs", name, lambda job: job["metadata"].update(finalizers=[FINALIZER]))
        self._threads.append(threading.Thread(target=self._reconcile, args=(name,), daemon=True))
        self._threads[-1].start()

    def _reconcile(self, name: str) -> None:
        try:
            job = self.cluster.get("rayjobs", name)
            assert job is not None
            self._run_attempts(name, job)
            self._clean_up(name, job["spec"])
            while True:
                self._pause(name)
        except Deleted:
            # The RayJob goes first; the garbage collector sees to its pods a while later (Kubernetes 1.34.4).
            pods = self._pods.pop(name, [])
            self.cluster.update("rayjobs", name, lambda job: job["metadata"].update(finalizers=[]))
            time.sleep(self.linger)
            for pod in pods:
                self.cluster.delete("pods", pod)

    def _run_attempts(self, name: str, job: Resource) -> None:
        """As KubeRay 1.6.2 and 1.7.0 do: a failure is Retrying at once, with its reason until the cluster is gone."""
        spec = job["spec"]
        if QUEUE_LABEL in job["metadata"]["labels"]:
            self._set(name, jobDeploymentStatus="Suspended")
            while not self.admitted.is_set():
                self._pause(name)
        for attempt in range(spec.get("backoffLimit", 0) + 1):
            failure = self._run_attempt(name, spec)
            if failure is None:
                self._set(name, jobDeploymentStatus="Complete", jobStatus=self.ends or "SUCCEEDED", succeeded=1)
                return
            again = attempt < spec.get("backoffLimit", 0)
            failure["jobDeploymentStatus"] = "Retrying" if again else "Failed"
            self._set(name, failed=attempt + 1, **failure)
            if not again:
                return
            for pod in self._pods.pop(name, []):
                self.cluster.delete("pods", pod)
            self._sleep(name, self.retry_seconds)
            self._set(name, jobDeploymentStatus="", jobStatus="", rayClusterName="", reason="", message="")

    def _run_attempt(self, name: str, spec: Resource) -> Resource | None:
        """What the status says of how it failed; None if it did not."""
        cluster = f"{name}-{secrets.token_hex(3)[:5]}"
        self.clusters.append(cluster)
        self._set(name, jobDeploymentStatus="Initializing", jobStatus="", rayClusterName=cluster)
        if not self._starts(name, cluster, spec):
            message = "The RayJob has passed the preRunningDeadlineSeconds."
            return {"reason": "PreRunningDeadlineExceeded", "message": message}
        code = self._run_entrypoint(name, spec)
        if code == 0 or self.ends:
            return None
        message = f"Job entrypoint command failed with exit code {code}"
        return {"jobStatus": "FAILED", "reason": "AppFailed", "message": message}

    def _starts(self, name: str, cluster: str, spec: Resource) -> bool:
        template = spec["rayClusterSpec"]["headGroupSpec"]["template"]
        status, events = self.head(template["spec"])
        labels = {"ray.io/cluster": cluster, "ray.io/node-type": "head", "ray.io/group": "headgroup"}
        pod = f"{cluster}-head-{secrets.token_hex(3)[:5]}"
        for number, event in enumerate(events):
            about = {"metadata": {"name": f"{pod}.{number}"}, "involvedObject": {"kind": "Pod", "name": pod}}
            self.cluster.create("events", event | about)
        if self.head is crash_loop:
            self.cluster.last_words[pod] = self.last_words
        self._start_pod(name, pod, template, labels, status)
        if self.head is running:
            return True
        while not self.seen():
            self._pause(name)
        self._sleep(name, spec.get("preRunningDeadlineSeconds", 1e9))
        return False

    def _run_entrypoint(self, name: str, spec: Resource) -> int:
        head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        template = spec["submitterPodTemplate"]
        status, _ = running(template["spec"])
        pod = self._start_pod(name, f"{name}-{secrets.token_hex(3)[:5]}", template, {"job-name": name}, status)
        log = self.cluster.logs[pod] = list[bytes]()
        self._set(name, jobDeploymentStatus="Running", jobStatus="PENDING")
        process = subprocess.Popen(
            shlex.split(spec["entrypoint"]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment(head),
            start_new_session=True,
        )
        self.started.append(name)
        reader = threading.Thread(target=_copy_lines, args=(process, log), daemon=True)
        reader.start()
        self._set(name, jobStatus="RUNNING")
        try:
            while process.poll() is None:
                self._pause(name)
        finally:
            _end(process)
            reader.join(60)
        return process.returncode

    def _environment(self, container: Resource) -> dict[str, str]:
        """What the image and the manifest give to the container; of this process only what stands in for the image."""
        image = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": os.environ.get("HOME", "/"),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "PYTHONUNBUFFERED": "1",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # a pod has its CPUs for itself
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "NCSN_CACHE_DIR": os.environ["NCSN_CACHE_DIR"],
            **PATIENT_RAY,
        }
        for source in container.get("envFrom", []):
            (reference,) = source.values()
            image |= self.references.get(reference["name"], {})
        return image | {variable["name"]: variable["value"] for variable in container.get("env", [])}

    def _start_pod(self, job: str, pod: str, template: Resource, labels: dict[str, str], status: Resource) -> str:
        metadata = {"name": pod, "labels": template["metadata"]["labels"] | labels}
        content = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"], "status": status}
        self.cluster.create("pods", content)
        self._pods.setdefault(job, []).append(pod)
        return pod

    def _clean_up(self, name: str, spec: Resource) -> None:
        status, began = (self.cluster.get("rayjobs", name) or {}).get("status", {}), time.monotonic()
        for seconds, policy in _due(spec, status):
            while time.monotonic() < began + seconds * self.second:
                self._pause(name)
            if policy == "DeleteSelf":
                self.cluster.delete("rayjobs", name)

    def _set(self, name: str, **status: Any) -> None:
        self._raise_if_deleted(name)
        self.cluster.update("rayjobs", name, lambda job: job.setdefault("status", {}).update(status))

    def _sleep(self, name: str, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self._pause(name)

    def _pause(self, name: str) -> None:
        self._raise_if_deleted(name)
        time.sleep(POLL_SECONDS)

    def _raise_if_deleted(self, name: str) -> None:
        job = self.cluster.get("rayjobs", name)
        if job is None or "deletionTimestamp" in job["metadata"]:
            raise Deleted


def _due(spec: Resource, status: Resource) -> list[tuple[float, str]]:
    """Seconds and policy of each deletion rule that holds; nothing without rules."""
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    held = (rule for rule in rules if rule["condition"].items() - {("ttlSeconds", _ttl(rule))} <= status.items())
    return sorted((_ttl(rule), rule["policy"]) for rule in held)


def _ttl(rule: Resource) -> int:
    return int(rule["condition"].get("ttlSeconds", 0))


def _copy_lines(process: subprocess.Popen[str], log: list[bytes]) -> None:
    assert process.stdout
    for line in process.stdout:
        now = time.time_ns()
        stamp = datetime.fromtimestamp(now // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        log.append(f"{stamp}.{now % 10**9:09d}Z {line}".encode())


def _end(process: subprocess.Popen[str]) -> None:
    """As a pod ends: SIGTERM to all, SIGKILL to those still running."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)
