"""Who reaches whom: the NetworkPolicies, read as Kubernetes reads them, and the Services behind the addresses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

INFRA = Path(__file__).parents[2] / "infra"
PLACES = {
    "kuberay": "kubeflow",
    "monitoring": "kubeflow",
    "mlflow": "ncsn-system",
    "object-store": "ncsn-system",
}
NAMESPACES = {
    "kubeflow": {"ncsn.dev/pipelines": "true"},
    "ncsn-system": {"app.kubernetes.io/part-of": "ncsn"},
    "kuberay-system": {},
    "monitoring": {},
    "ingress": {"ncsn.dev/ingress": "true"},
    "elsewhere": {},
}


@dataclass(frozen=True)
class Pod:
    """Where a pod runs, and its labels."""

    namespace: str
    labels: dict[str, str] = field(default_factory=dict)


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((INFRA / "base" / name).read_text())
    return document


def pod_of(name: str) -> Pod:
    """The pod of a Deployment, StatefulSet or Job."""
    return Pod("ncsn-system", load(name)["spec"]["template"]["metadata"]["labels"])


def ray_pod(template: dict[str, Any], *, node: bool) -> Pod:
    """A pod of the RayJob with the labels that KubeRay adds."""
    return Pod("kubeflow", template["metadata"]["labels"] | ({"ray.io/is-ray-node": "yes"} if node else {}))


RAYJOB = load("kuberay/rayjob.yaml")["spec"]
CLUSTER = RAYJOB["rayClusterSpec"]
PODS = {
    "head": ray_pod(CLUSTER["headGroupSpec"]["template"], node=True),
    "worker": ray_pod(CLUSTER["workerGroupSpecs"][0]["template"], node=True),
    "submitter": ray_pod(RAYJOB["submitterPodTemplate"], node=False),
    "janitor": Pod(
        "kubeflow",
        load("janitor/cron-job.yaml")["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"],
    ),
    "KFP task": Pod("kubeflow", {"pipeline/runid": "5f3a"}),
    "seaweedfs": pod_of("object-store/stateful-set.yaml"),
    "mlflow": pod_of("mlflow/deployment.yaml"),
    "postgres": pod_of("mlflow/postgres-stateful-set.yaml"),
    "operator by helm": Pod(
        "kuberay-system",
        {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"},
    ),
    "operator by kustomize": Pod(
        "kubeflow", {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"}
    ),
    "prometheus": Pod("monitoring", {"app.kubernetes.io/name": "prometheus"}),
    "ingress controller": Pod("ingress"),
    "stranger": Pod("elsewhere", {"app.kubernetes.io/name": "anything"}),
}


def matches(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    return selector is not None and selector.get("matchLabels", {}).items() <= labels.items()


def admits(peer: dict[str, Any], *, source: Pod, namespace: str) -> bool:
    """A peer without namespaceSelector means the policy's own namespace."""
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], NAMESPACES[source.namespace]):
            return False
    elif source.namespace != namespace:
        return False
    return "podSelector" not in peer or matches(peer["podSelector"], source.labels)


def reaches(source: Pod, target: Pod, port: int, *, without: str = "") -> bool:
    """Whether the policies let a connection in; a pod that none selects takes every one."""
    selected = False
    for path in INFRA.glob("base/*/*network-policy.yaml"):
        place, policy = PLACES[path.parent.name], load(f"{path.parent.name}/{path.name}")["spec"]
        if (
            path.parent.name == without
            or place != target.namespace
            or not matches(policy["podSelector"], target.labels)
        ):
            continue
        selected = True
        for rule in policy["ingress"]:
            ports = {each["port"] for each in rule.get("ports", [])}
            if (not ports or port in ports) and any(
                admits(peer, source=source, namespace=place) for peer in rule["from"]
            ):
                return True
    return not selected


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("worker", "head", 6379),
        ("head", "worker", 10002),
        ("submitter", "head", 8265),
        ("operator by helm", "head", 8265),
        ("operator by kustomize", "head", 8265),
        ("prometheus", "worker", 8080),
        ("KFP task", "seaweedfs", 8333),
        ("KFP task", "mlflow", 5000),
        ("janitor", "mlflow", 5000),
        ("janitor", "seaweedfs", 8333),
        ("worker", "seaweedfs", 8333),
        ("head", "mlflow", 5000),
        ("ingress controller", "mlflow", 5000),
        ("mlflow", "seaweedfs", 8333),
        ("mlflow", "postgres", 5432),
    ],
)
def test_what_must_talk_may(source: str, target: str, port: int) -> None:
    assert reaches(PODS[source], PODS[target], port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("KFP task", "head", 8265),
        ("stranger", "head", 6379),
        ("prometheus", "head", 8265),
        ("operator by helm", "worker", 10002),
        ("stranger", "seaweedfs", 8333),
        ("KFP task", "seaweedfs", 9333),
        ("stranger", "mlflow", 5000),
        ("ingress controller", "seaweedfs", 8333),
        ("KFP task", "postgres", 5432),
    ],
)
def test_nothing_else_may(source: str, target: str, port: int) -> None:
    assert not reaches(PODS[source], PODS[target], port)


def test_metrics_are_open_only_with_monitoring() -> None:
    assert not reaches(PODS["prometheus"], PODS["head"], 8080, without="monitoring")


@pytest.mark.parametrize(
    ("service", "workload"),
    [
        ("object-store/service.yaml", "object-store/stateful-set.yaml"),
        ("mlflow/service.yaml", "mlflow/deployment.yaml"),
        ("mlflow/postgres-service.yaml", "mlflow/postgres-stateful-set.yaml"),
    ],
)
def test_a_service_leads_to_a_port_of_its_pod(service: str, workload: str) -> None:
    spec, template = load(service)["spec"], load(workload)["spec"]["template"]
    assert spec["selector"].items() <= template["metadata"]["labels"].items()
    assert load(workload)["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert [named[port["targetPort"]] for port in spec["ports"]] == [port["port"] for port in spec["ports"]]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        where = container.get(probe, {})
        asked = (where.get("httpGet") or where.get("tcpSocket") or {}).get("port")
        assert asked is None or asked in named


def test_the_monitor_finds_the_pods_and_their_port() -> None:
    monitor = load("monitoring/pod-monitor.yaml")["spec"]
    for name, group in (("head", CLUSTER["headGroupSpec"]), ("worker", CLUSTER["workerGroupSpecs"][0])):
        assert matches(monitor["selector"], PODS[name].labels)
        (container,) = group["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert {ports[endpoint["port"]] for endpoint in monitor["podMetricsEndpoints"]} == {8080}
