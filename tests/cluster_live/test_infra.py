"""`infra/` as a real API server takes it, and its servers as pods and a person's machine use them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from botocore.exceptions import ClientError
from installed_infra import CREDENTIALS, ENVIRONMENT, Infra, image_under_test
from live import BUCKET, PATIENCE, ROOT, Place, apply, eventually, kubectl

# 8 MB: above it MLflow would cut a file into parts, of which this size has two.
_ROUND_TRIP = """
import os, secrets, tempfile, pathlib
import ncsn.tracking, mlflow
content = secrets.token_bytes(8 << 20)
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "weights")
    file.write_bytes(content)
    with mlflow.start_run() as run:
        mlflow.log_artifact(file)
    there = {"run_id": run.info.run_id, "artifact_path": "weights"}
    back = mlflow.artifacts.download_artifacts(**there, dst_path=folder + "/back")
    assert pathlib.Path(back).read_bytes() == content
print("same")
"""

_S3_ALONE = {"8333": "no TLS", "18333": "TLSV13_ALERT_CERTIFICATE_REQUIRED"}
_OPEN_PORTS = """
import asyncio, json, socket, ssl, sys
host, found = sys.argv[1], {}
async def look(port, limit):
    async with limit:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 5)
        except OSError:
            return
        writer.close()
        found[port] = ""
async def look_at_all():
    limit = asyncio.Semaphore(200)
    await asyncio.gather(*(look(port, limit) for port in range(1, 65536)))
asyncio.run(look_at_all())
for port in found:
    context = ssl._create_unverified_context()
    try:
        context.wrap_socket(socket.create_connection((host, port), timeout=10)).recv(1)
    except ssl.SSLError as error:
        found[port] = error.reason if "ALERT" in error.reason else "no TLS"
print(json.dumps(found))
"""


@pytest.mark.timeout(1200)
def test_the_servers_become_ready_and_a_second_apply_is_taken(infra: Infra) -> None:
    infra.apply("standalone")
    infra.wait_for_servers()
    pods = infra.servers.pods("app.kubernetes.io/part-of=ncsn")
    restarts = {
        pod["metadata"]["name"]: status["restartCount"]
        for pod in pods
        for status in pod["status"].get("containerStatuses", [])
        if pod["status"]["phase"] == "Running"
    }
    assert len(restarts) >= 3 and not any(restarts.values()), restarts


@pytest.mark.timeout(120)
def test_a_task_may_change_its_notes_and_no_other_configmap(home: Place) -> None:
    namespace = home.namespace.name

    def may(verb: str, name: str) -> bool:
        what = {"namespace": namespace, "verb": verb, "resource": "configmaps", "name": name}
        spec = {"user": f"system:serviceaccount:{namespace}:pipeline-runner", "resourceAttributes": what}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        answer = kubectl("create", "--filename", "-", "--output", "json", stdin=json.dumps(review))
        return bool(json.loads(answer)["status"]["allowed"])

    assert may("get", "ncsn-runs") and may("patch", "ncsn-runs")
    assert not any(may(verb, "workflow-controller-configmap") for verb in ("patch", "update", "delete"))


@pytest.mark.timeout(240)
def test_a_dump_of_the_database_can_be_restored(infra: Infra) -> None:
    def inside(command: str) -> str:
        return kubectl("exec", "--namespace", infra.system, "postgres-0", "--", "sh", "-c", command, seconds=120)

    inside("pg_dump --username=mlflow --format=custom mlflow > /tmp/mlflow.dump")
    inside("createdb --username=mlflow restored && pg_restore --username=mlflow --dbname=restored /tmp/mlflow.dump")
    count = "psql --username=mlflow --tuples-only --command='select count(*) from alembic_version, experiments' "
    assert int(inside(f"{count} restored")) == int(inside(f"{count} mlflow")) >= 1


@pytest.mark.timeout(240)
def test_doctor_finds_nothing_ill(home: Place) -> None:
    command = home.commands.run("doctor", "--json", *home.options(), seconds=180)
    findings = {finding["check"]: finding["state"] for finding in command.result()}
    assert {findings[check] for check in ("store", "mlflow", "pod image", "kubernetes", "rights", "kuberay")} == {"ok"}
    assert set(findings.values()) <= {"ok", "not configured"}


@pytest.mark.timeout(240)
def test_an_artifact_goes_up_and_down_from_this_machine(home: Place) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ROUND_TRIP],
        env={**os.environ, **home.environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=150 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "same"


@pytest.mark.timeout(300)
def test_an_artifact_goes_up_and_down_from_a_pod_of_another_namespace(place: Place) -> None:
    start_pod(place, "round-trip", "python", "-c", _ROUND_TRIP)
    assert ended_phase(place, "round-trip") == "Succeeded", log(place, "round-trip")


@pytest.mark.timeout(300)
def test_of_the_object_store_a_pod_of_another_namespace_reaches_s3_alone(infra: Infra, place: Place) -> None:
    """Whether the network enforces policies or not; what it finds open beside S3 wants a certificate."""
    (pod,) = infra.servers.pods("app.kubernetes.io/name=seaweedfs")
    start_pod(place, "look", "python", "-c", _OPEN_PORTS, pod["status"]["podIP"])
    assert ended_phase(place, "look") == "Succeeded", log(place, "look")
    assert json.loads(log(place, "look").splitlines()[-1]) in ({"8333": "no TLS"}, _S3_ALONE)


@pytest.mark.timeout(120)
def test_a_namespace_has_its_own_prefix_of_the_bucket(home: Place) -> None:
    s3 = home.s3()
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.put_object(Bucket=BUCKET, Key="mlflow/model", Body=b"mine")
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.list_objects_v2(Bucket=BUCKET)
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.create_bucket(Bucket="another")


@pytest.mark.timeout(900)
def test_an_ingest_waits_for_an_object_store_that_is_away(infra: Infra, place: Place) -> None:
    """In a pod: a forwarded port ends with the pod that it leads to."""
    scale = ("scale", "statefulset/seaweedfs", "--namespace", infra.system)
    settings = ("--set", f"storage.root=s3://{BUCKET}/{place.prefix}", "--set", "data.max_images=777")
    kubectl(*scale, "--replicas=0")
    try:
        eventually(
            lambda: not infra.servers.pods_at_work("app.kubernetes.io/name=seaweedfs"), "it is away", seconds=120
        )
        start_pod(place, "away", "ncsn", "ingest", "--config", "digits", "--run", "away", *settings)
        eventually(lambda: "unavailable" in log(place, "away"), "it is missed", seconds=120)
    finally:
        kubectl(*scale, "--replicas=1")
        infra.wait_for_servers()
    assert ended_phase(place, "away") == "Succeeded", log(place, "away")


def start_pod(place: Place, name: str, *command: str) -> None:
    container = {
        "name": "main",
        "image": image_under_test(),
        "command": list(command),
        "envFrom": [{"configMapRef": {"name": ENVIRONMENT}}, {"secretRef": {"name": CREDENTIALS}}],
        "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"restartPolicy": "Never", "securityContext": security, "containers": [container]}
    metadata = {"name": name, "namespace": place.namespace.name}
    apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})


def ended_phase(place: Place, name: str) -> str:
    def phase() -> str:
        return str(place.namespace.get("pod", name)["status"]["phase"])

    eventually(lambda: phase() in {"Succeeded", "Failed"}, "the pod ended", seconds=240)
    return phase()


def log(place: Place, name: str) -> str:
    """Empty before the pod runs."""
    if place.namespace.get("pod", name)["status"]["phase"] == "Pending":
        return ""
    return kubectl("logs", name, "--namespace", place.namespace.name)
