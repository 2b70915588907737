"""What a RayJob will need of the cluster, checked by `ncsn doctor` before there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from ncsn.config.compute import ComputeConfig
from ncsn.errors import UserError
from ncsn.process import IMAGE_VARIABLE
from ncsn.remote.backend import CHECK_SECONDS, Check, NotConfigured
from ncsn.remote.kubernetes import INSTALL_KUBERAY, KubernetesApi
from ncsn.remote.manifest import GPU, TEMPLATE_VARIABLE, load_template

STANDALONE = "kubeflow"  # namespace of the runs where Kubeflow Pipelines serves one user
NEEDED = (  # what infra/base/rbac/launcher-role.yaml grants
    *((verb, "rayjobs.ray.io") for verb in ("create", "get", "list", "watch", "delete")),
    *((verb, "pods") for verb in ("get", "list")),
    ("get", "pods/log"),
    ("list", "events"),
    ("get", "workflows.argoproj.io"),
    *((verb, "configmaps") for verb in ("create", "delete")),
)


def kuberay_checks(compute: ComputeConfig) -> Iterator[Check]:
    """The checks of the backend `kuberay`; only the first if no cluster is configured."""
    settings = compute.kuberay
    try:
        api = KubernetesApi(settings.namespace, patience=CHECK_SECONDS)
    except UserError:
        yield Check("kubernetes", lambda: KubernetesApi(settings.namespace).server, "export KUBECONFIG=FILE")
        return
    grant = f"kubectl apply --kustomize infra/{'base/rbac' if api.namespace == STANDALONE else 'overlays/multi-user'}"
    unreachable: Mapping[type[Exception], str] = {ConnectionError: "kubectl cluster-info"}
    image = settings.image or os.environ.get(IMAGE_VARIABLE)
    yield Check("kubernetes", lambda: f"{api.server}, namespace {api.namespace!r}", "")
    yield Check("rights", lambda: check_rights(api), grant, unreachable)
    for_crd = {**unreachable, FileNotFoundError: f"unset {TEMPLATE_VARIABLE}"}
    yield Check("kuberay", lambda: check_crd(api), INSTALL_KUBERAY, for_crd)
    yield Check("pod image", lambda: check_image(image), f"export {IMAGE_VARIABLE}=REGISTRY/ncsn-python:TAG")
    yield Check("gpus", lambda: check_gpus(api, compute), "kubectl describe nodes | grep nvidia.com/gpu")
    yield Check("queue", lambda: check_queue(api, settings.queue), f"kubectl get localqueues -n {api.namespace}")


def check_rights(api: KubernetesApi) -> str:
    """Every verb that the launcher uses."""
    missing = [f"{verb} {resource}" for verb, resource in NEEDED if not api.allowed(verb, resource)]
    if missing:
        raise PermissionError(f"this account may not {', '.join(missing)} in namespace {api.namespace!r}")
    return f"{len(NEEDED)} verbs in namespace {api.namespace!r}"


def check_crd(api: KubernetesApi) -> str:
    """The RayJob that is installed. KubeRay 1.6 brought one of its fields, and needs no gate for deletion rules."""
    load_template()
    if "preRunningDeadlineSeconds" not in api.rayjob_fields():
        raise UserError("KubeRay", "before 1.6; it lacks fields of the RayJob")
    return "RayJob ray.io/v1, KubeRay 1.6 or later"


def check_image(image: str | None) -> str:
    """The image of the Ray pods. Only a pod can find out whether it can be pulled."""
    if image is None:
        raise UserError(
            "compute.kuberay.image", f"not set, and neither is {IMAGE_VARIABLE}: the Ray pods have no image"
        )
    return image


def check_gpus(api: KubernetesApi, compute: ComputeConfig) -> str:
    """As many GPUs as workers, on nodes that the workers may use, with all GPUs of a pod on one node."""
    if not compute.use_gpu:
        raise NotConfigured("compute.use_gpu is false")
    if not api.allowed("list", "nodes"):
        raise NotConfigured("this account may not list nodes")
    wanted = compute.kuberay.node_selector.items()
    nodes = [node for node in api.find("nodes") if wanted <= node["metadata"].get("labels", {}).items()]
    usable = [node.get("status", {}) for node in nodes if not node.get("spec", {}).get("unschedulable")]
    each = [int(status.get("allocatable", {}).get(GPU, 0)) for status in usable]
    have, size = sum(each), compute.kuberay.workers_per_pod
    room = sum(gpus // size for gpus in each)
    if room < compute.min_pods:
        raise UserError(
            "compute.num_workers",
            f"needs {compute.min_pods} pods of {size} GPUs, but the nodes have room for {room}; GPUs of each node: "
            f"{', '.join(map(str, sorted(each, reverse=True))) or 'none'}",
            value=compute.num_workers,
        )
    return f"{have} GPUs for {compute.max_workers} workers in {compute.max_pods} pods"


def check_queue(api: KubernetesApi, name: str | None) -> str:
    """Kueue's LocalQueue, active."""
    if name is None:
        raise NotConfigured("compute.kuberay.queue is null")
    queue = api.get("localqueues", name)
    if queue is None:
        raise UserError("compute.kuberay.queue", f"no such LocalQueue in namespace {api.namespace}", value=name)
    conditions = queue.get("status", {}).get("conditions", [])
    active = next((each for each in conditions if each["type"] == "Active"), {"status": "True"})
    if active["status"] != "True":
        reason = active.get("message") or active.get("reason", "")
        raise UserError("compute.kuberay.queue", f"this LocalQueue is not active: {reason}", value=name)
    return f"LocalQueue {name!r} of ClusterQueue {queue['spec']['clusterQueue']!r}"
