"""The servers of a cluster, for the header of a test report."""

from __future__ import annotations

import json
import os

import urllib3
from kubeflow_pipelines import NAMESPACE, PORT, SERVICE
from real_cluster import KubectlFailed, Resource, get, kubectl

# The first release whose RayJob has the field.
_SINCE = {
    "1.7": ("rayClusterSpec", "networkPolicy"),
    "1.6": ("preRunningDeadlineSeconds",),
    "1.5": ("deletionStrategy",),
}


def describe_versions() -> list[str]:
    """One line for each server."""
    kubernetes = json.loads(kubectl("version", "--output", "json"))["serverVersion"]["gitVersion"]
    nodes = get("nodes")["items"]
    runtimes = {node["status"]["nodeInfo"]["containerRuntimeVersion"] for node in nodes}
    return [
        f"Kubernetes: {kubernetes}, {len(nodes)} nodes, {', '.join(sorted(runtimes))}",
        f"KubeRay: {_kuberay()}",
        f"Kubeflow Pipelines: {_kubeflow()}",
    ]


def _kuberay() -> str:
    try:
        crd = get("crd", "rayjobs.ray.io")
    except KubectlFailed:
        return "none"
    selector = "app.kubernetes.io/component=kuberay-operator"
    operators = get("deployments", "--all-namespaces", "--selector", selector)["items"]
    images = {operator["spec"]["template"]["spec"]["containers"][0]["image"] for operator in operators}
    (version,) = (each for each in crd["spec"]["versions"] if each["name"] == "v1")
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    release = next((release for release, path in _SINCE.items() if _has(spec, path)), "before 1.5")
    return f"CRD of {release}, operator {', '.join(sorted(images)) or 'not in a Deployment'}"


def _kubeflow() -> str:
    path = "/apis/v2beta1/healthz"
    try:
        if endpoint := os.environ.get("KF_PIPELINES_ENDPOINT"):
            answer = urllib3.request("GET", f"{endpoint.rstrip('/')}{path}", timeout=10, retries=False).json()
        else:
            proxied = f"/api/v1/namespaces/{NAMESPACE}/services/{SERVICE}:{PORT}/proxy{path}"
            answer = json.loads(kubectl("get", "--raw", proxied))
    except (KubectlFailed, urllib3.exceptions.HTTPError, ValueError) as error:
        return f"none ({error})"
    return str(answer.get("tag_name") or answer.get("apiServerTagName"))


def _has(schema: Resource, path: tuple[str, ...]) -> bool:
    for name in path:
        schema = schema.get("properties", {}).get(name, {})
    return bool(schema)
