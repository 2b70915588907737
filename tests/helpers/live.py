"""A real cluster: its objects by kubectl, `infra/` on it, a namespace for runs, commands that use it, and Kubeflow."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
import urllib3
from botocore.exceptions import ClientError
from ports import free_port

from ncsn.storage import absolute_uris

Resource = dict[str, Any]

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"

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


@dataclass
class Command:
    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds * PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {seconds * PATIENCE:g} s; it said last: {self.said[-2000:]}"
            ) from None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def said(self) -> str:
        return self.err.read_text(errors="replace")

    def result(self) -> Any:
        return json.loads(self.out.read_text())


@dataclass(frozen=True)
class Commands:
    folder: Path
    environment: Mapping[str, str]

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[Command]:
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{len(list(self.folder.glob('*.out'))):02}-{arguments[0]}"
        out, err = self.folder / f"{stem}.out", self.folder / f"{stem}.err"
        (self.folder / f"{stem}.command").write_text(shlex.join(["ncsn", *arguments]) + "\n")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "ncsn", *arguments],
                stdout=stdout,
                stderr=stderr,
                cwd=ROOT,
                env={**os.environ, **self.environment},
            )
        try:
            yield Command(process, out, err)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def run(self, *arguments: str, seconds: float, code: int = 0) -> Command:
        with self.running(*arguments) as command:
            ended = command.wait(seconds)
        assert ended == code, f"ncsn {arguments[0]} exited with {ended}: {command.said[-3000:]}"
        return command

    def copy_to(self, folder: Path) -> None:
        if self.folder.exists():
            shutil.copytree(self.folder, folder, dirs_exist_ok=True)


BUCKET, EXPERIMENT = "ncsn", "ncsn"
# A training that takes a minute or two on one core, in little memory.
SMALL = {
    "network.widths": "[16,32]",
    "network.blocks_per_resolution": 1,
    "train.num_images": 12800,
    "train.checkpoint_every_images": 3200,
    "train.report_every_images": 1280,
    "sampling.num_images": 64,
    "sampling.batch_size": 32,
    "sampling.sampler.steps_per_level": 2,
    "evaluation.classifier_epochs": 5,
    "compute.num_workers": 1,
    "compute.kuberay.head_memory": "3Gi",
    "compute.kuberay.memory_per_worker": "2Gi",
}


@dataclass(frozen=True)
class Place:
    """A namespace that is ready for pipelines, and what uses it from this machine."""

    namespace: Namespace
    environment: dict[str, str]
    commands: Commands

    @property
    def folder(self) -> str:
        """The name of this test's own place."""
        return self.commands.folder.name

    @property
    def prefix(self) -> str:
        """Where in the bucket `ncsn` its experiments are: in what the key of the namespace may read and write."""
        return f"{self.namespace.name}/{self.folder}"

    def options(self, settings: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        here = {
            "storage.root": f"s3://{BUCKET}/{self.prefix}",
            "compute.backend": "kuberay",
            "compute.kuberay.namespace": self.namespace.name,
        }
        values = {**SMALL, **here, **(settings or {})}
        config = ("--config", str(ROOT / "configs" / "digits.yaml"))
        return config + tuple(part for name, value in values.items() for part in ("--set", f"{name}={value}"))

    def stored(self, path: str) -> Any:
        """The JSON at a path of `storage.root`; None where there is none."""
        try:
            found = json.load(self.s3().get_object(Bucket=BUCKET, Key=f"{self.prefix}/{path}")["Body"])
            return absolute_uris(found, f"s3://{BUCKET}/{self.prefix}")
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise

    def wait_for_checkpoint(self, run: str, command: Command, *, seconds: float = 420) -> int:
        """Images of the newest checkpoint, once training has made one."""
        eventually(lambda: self.checkpoints(run) or command.ended, "there is a checkpoint", seconds=seconds)
        assert not command.ended, command.said[-3000:]
        return max(int(name.removeprefix("images-")) for name in self.checkpoints(run))

    def least_progress(self, run: str, command: Command, *, seconds: float) -> int:
        """The fewest images that training shows as done until the command ends."""
        seen: list[int] = []

        def ended() -> bool:
            progress = self.stored(f"runs/{run}/steps/train/progress.json")
            seen.extend([progress["done"]] if progress else [])
            return command.ended

        eventually(ended, "the command has ended", seconds=seconds)
        return min(seen)

    def checkpoints(self, run: str) -> set[str]:
        files = self.files(f"runs/{run}/checkpoints")
        return {name.partition("/")[0] for name in files if name.endswith("/checkpoint.json")}

    def files(self, path: str) -> dict[str, datetime]:
        """When each object below a path of `storage.root` was written."""
        prefix = f"{self.prefix}/{path}/"
        found = self.s3().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return {each["Key"].removeprefix(prefix): each["LastModified"] for each in found}

    def text(self, path: str) -> str:
        body: bytes = self.s3().get_object(Bucket=BUCKET, Key=f"{self.prefix}/{path}")["Body"].read()
        return body.decode()

    def tracked(self, run: str) -> set[str]:
        """States of what MLflow has under the name of a run: the run as a whole and its steps."""
        server = self.environment["MLFLOW_TRACKING_URI"] + "/api/2.0/mlflow"
        asked = {"experiment_name": EXPERIMENT}
        experiment = urllib3.request("GET", f"{server}/experiments/get-by-name", fields=asked).json()["experiment"]
        search = {"experiment_ids": [experiment["experiment_id"]], "filter": f"tags.`ncsn.run` = '{run}'"}
        found = urllib3.request("POST", f"{server}/runs/search", json=search).json().get("runs", [])
        return {each["info"]["status"] for each in found}

    def at_work(self, run: str) -> list[str]:
        """RayJobs of a run, and pods of them that may still work."""
        labels = f"ncsn.dev/run={run}"
        rayjobs = self.namespace.get("rayjobs.ray.io", "--selector", labels)["items"]
        return [rayjob["metadata"]["name"] for rayjob in rayjobs] + self.namespace.pods_at_work(labels)

    def s3(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            region_name=self.environment["AWS_REGION"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
        )


NAMESPACE = "kubeflow"
ENDED = {"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"}
_EXECUTOR = re.compile(r"\.([\w-]+)(?:\(\d+\))?\.executor(?:\(\d+\))?$")
_HTTP = urllib3.PoolManager(retries=urllib3.Retry(3, backoff_factor=1), timeout=30)


@dataclass(frozen=True)
class Kubeflow:
    """Kubeflow Pipelines without users, whose runs are in the namespace `kubeflow`."""

    endpoint: str

    def run(self, run_id: str) -> Resource:
        return self._ask("GET", f"runs/{run_id}")

    def terminate(self, run_id: str) -> None:
        """What the button Terminate does."""
        self._ask("POST", f"runs/{run_id}:terminate")

    def terminate_all(self, name: str) -> list[str]:
        """Terminate the unfinished runs of this name among the latest fifty; their identifiers."""
        runs = self._ask("GET", "runs?page_size=50&sort_by=created_at%20desc").get("runs", [])
        over = ENDED | {"CANCELING"}  # which it refuses to terminate twice
        at_work = [run["run_id"] for run in runs if run["display_name"] == name and run["state"] not in over]
        for run_id in at_work:
            self.terminate(run_id)
        return at_work

    def workflow(self, run_id: str) -> Resource:
        selector = f"pipeline/runid={run_id}"
        (found,) = get("workflows.argoproj.io", "--namespace", NAMESPACE, "--selector", selector)["items"]
        workflow: Resource = found
        return workflow

    def worked_tasks(self, run_id: str) -> set[str]:
        """Names of the pipeline's tasks whose container ran; of what KFP's cache had, none does.

        Argo 4.0.5 calls the pod `WORKFLOW.root(0).train(0).executor(0)`, without the numbers where nothing is retried.
        Where the nodes and the Workflow have more than a megabyte, it compresses them.
        """
        status = self.workflow(run_id)["status"]
        packed = status.get("compressedNodes")
        nodes = json.loads(gzip.decompress(base64.b64decode(packed))) if packed else status["nodes"]
        names = (node["name"] for node in nodes.values() if node["type"] == "Pod")
        return {found[1] for name in names if (found := _EXECUTOR.search(name))}

    def _ask(self, method: str, path: str) -> Resource:
        response = _HTTP.request(method, f"{self.endpoint}/apis/v2beta1/{path}")
        assert response.status == 200, f"{method} {path}: {response.status} {response.data.decode()[:500]}"
        answer: Resource = json.loads(response.data or b"{}")
        return answer


@contextlib.contextmanager
def find_kubeflow() -> Iterator[Kubeflow | None]:
    """That at KF_PIPELINES_ENDPOINT, or the one in the namespace `kubeflow`, or None."""
    if endpoint := os.environ.get("KF_PIPELINES_ENDPOINT"):
        yield Kubeflow(endpoint.rstrip("/"))
    elif exists("service", "ml-pipeline", "--namespace", NAMESPACE):
        with forwarded(NAMESPACE, "ml-pipeline", 8888) as address:
            yield Kubeflow(f"http://{address}")
    else:
        yield None
