"""The cluster that KUBECONFIG reaches, by kubectl: objects, namespaces that are deleted again, forwarded ports."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ports import free_port

Resource = dict[str, Any]

PURPOSE = {"app.kubernetes.io/part-of": "ncsn-test-cluster"}  # label of every namespace that the tests make
# Factor of every limit of time, for a cluster that is slow or busy with other work.
PATIENCE = float(os.environ.get("NCSN_PATIENCE", "1"))
READY = {"ncsn.dev/pipelines": "true", "pod-security.kubernetes.io/enforce": "restricted"}
WORKERS, HEADS = "ray.io/node-type=worker", "ray.io/node-type=head"


class KubectlFailed(AssertionError):
    """A command and its output."""


def kubectl(*arguments: str, stdin: str | None = None, seconds: float = 60) -> str:
    """Its standard output."""
    limit = seconds * PATIENCE
    try:
        done = subprocess.run(
            ["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired:
        raise KubectlFailed(f"kubectl {' '.join(arguments)}: no answer in {limit:g} s") from None
    if done.returncode:
        raise KubectlFailed(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def get(*arguments: str) -> Resource:
    found: Resource = json.loads(kubectl("get", *arguments, "--output", "json"))
    return found


def exists(*arguments: str) -> bool:
    """Whether `kubectl get` finds the one object, or any of the list; a kind that the cluster does not know is none."""
    try:
        return bool(kubectl("get", *arguments, "--ignore-not-found", "--output", "name").strip())
    except KubectlFailed as error:
        if "the server doesn't have a resource type" in str(error):
            return False
        raise


def apply(*resources: Resource) -> None:
    kubectl("apply", "--filename", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": resources}))


def eventually(condition: Callable[[], object], what: str, *, seconds: float) -> float:
    started, limit = time.monotonic(), seconds * PATIENCE
    while True:
        failure = ""
        try:
            if condition():
                return time.monotonic() - started
        except KubectlFailed as error:  # a busy API server answers the next time
            failure = f"; {error}"
        assert time.monotonic() - started < limit, f"waited {limit:g} s, not true: {what}{failure}"
        time.sleep(1)


@contextlib.contextmanager
def new_namespace(name: str, *, labels: Mapping[str, str] = READY) -> Iterator[str]:
    """A namespace that is deleted at the end; by default one for pipelines with the strictest pod security."""
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {**PURPOSE, **labels}}})
    try:
        yield name
    finally:
        # Waits, so that the next test has the memory of this one's pods.
        kubectl("delete", "namespace", name, "--ignore-not-found", "--timeout=4m", seconds=250)


@dataclass(frozen=True)
class Namespace:
    """What the tests look for in a namespace."""

    name: str

    def get(self, *arguments: str) -> Resource:
        return get(*arguments, "--namespace", self.name)

    def pods(self, selector: str) -> list[Resource]:
        """The pods with these labels that are not being deleted."""
        items = self.get("pods", "--selector", selector)["items"]
        return [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]

    def pods_at_work(self, selector: str) -> list[str]:
        """Names of the pods with these labels of which a container may still run."""
        items = self.get("pods", "--selector", selector)["items"]
        return [pod["metadata"]["name"] for pod in items if pod["status"]["phase"] in {"Pending", "Running"}]

    def rayjobs(self) -> list[Resource]:
        found: list[Resource] = self.get("rayjobs.ray.io")["items"]
        return found

    def is_empty(self) -> bool:
        """Whether no RayJob and no running pod of one is left."""
        return not self.rayjobs() and not self.pods_at_work(
            "app.kubernetes.io/part-of=ncsn,app.kubernetes.io/name!=ncsn-janitor"
        )

    def delete(self, *arguments: str) -> None:
        """Delete without waiting for the end."""
        kubectl("delete", *arguments, "--namespace", self.name, "--wait=false")


@contextlib.contextmanager
def forwarded(namespace: str, service: str, port: int) -> Iterator[str]:
    """Address on this machine that leads to a Service, `127.0.0.1:PORT`, while the block runs.

    A `kubectl port-forward` ends when the pod behind it does, so it is started again until the block ends.
    """
    local = free_port()
    command = ["kubectl", "port-forward", "--namespace", namespace, f"service/{service}", f"{local}:{port}"]
    ended = threading.Event()
    running: list[subprocess.Popen[bytes]] = []

    def keep() -> None:
        while not ended.is_set():
            # In a new session, so that Ctrl-C does not cut the launchers under test off from their store.
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            running[:] = [process]
            process.wait()
            ended.wait(1)

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        eventually(lambda: _accepts(local), f"{service}.{namespace} can be reached", seconds=60)
        yield f"127.0.0.1:{local}"
    finally:
        ended.set()
        for process in running:
            process.terminate()
        keeper.join(timeout=10)


def require_cluster() -> str:
    try:
        kubectl("get", "--raw", "/readyz", seconds=30)
        view = json.loads(kubectl("config", "view", "--minify", "--output", "json"))
    except (KubectlFailed, FileNotFoundError) as error:
        where = os.environ.get("KUBECONFIG", "~/.kube/config")
        raise ValueError(f"no cluster: {error}; set KUBECONFIG (now {where}) to that of a cluster") from None
    return str(view["clusters"][0]["cluster"]["server"])


def describe_versions() -> list[str]:
    """Lines on the servers of the cluster, for the header of a test report."""
    version = json.loads(kubectl("version", "--output", "json"))["serverVersion"]["gitVersion"]
    found = [f"Kubernetes: {version}, {len(get('nodes')['items'])} nodes"]
    for name, labels in (("KubeRay", "app.kubernetes.io/component=kuberay-operator"), ("KFP", "app=ml-pipeline")):
        servers = get("deployments", "--all-namespaces", "--selector", labels)["items"]
        images = {server["spec"]["template"]["spec"]["containers"][0]["image"] for server in servers}
        found.append(f"{name}: {', '.join(sorted(images)) or 'not in a Deployment'}")
    return found


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        return True
    return False
