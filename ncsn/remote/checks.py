"""What a RayJob will need of the cluster, looked at before there is one. A check says what it found, or raises."""

from __future__ import annotations

from ncsn.config.compute import ComputeConfig
from ncsn.errors import UserError
from ncsn.remote.kubernetes import KubernetesApi, Resource
from ncsn.remote.manifest import fit_to_schema, load_template

NEEDED = (
    *((verb, "rayjobs.ray.io") for verb in ("create", "get", "list", "watch", "patch", "delete")),
    *((verb, "pods") for verb in ("get", "list")),
    ("get", "pods/log"),
    ("list", "events"),
    ("get", "workflows.argoproj.io"),
    *((verb, "configmaps") for verb in ("create", "delete")),
)
"""What infra/base/rbac/launcher-role.yaml grants."""
GPU = "nvidia.com/gpu"
_IN_WORDS = {"authOptions": "token auth"}


def check_rights(api: KubernetesApi) -> str:
    """Every verb that the launcher uses.

    Raises:
        PermissionError: naming those that are missing.
    """
    missing = [f"{verb} {resource}" for verb, resource in NEEDED if not api.allowed(verb, resource)]
    if missing:
        raise PermissionError(f"this account may not {', '.join(missing)} in namespace {api.namespace!r}")
    return f"{len(NEEDED)} verbs in namespace {api.namespace!r}"


def check_crd(api: KubernetesApi) -> str:
    """The RayJob that is installed, by the fields that it has.

    Raises:
        UserError: if there is none.
        NotFound: if there is no template to compare it with.
    """
    schema = api.rayjob_schema()
    _, unknown = fit_to_schema(load_template(), schema)
    known = schema.get("properties", {}).get("spec", {}).get("properties", {})
    since = {"preRunningDeadlineSeconds": "1.6", "deletionStrategy": "1.5"}
    release = next((version for name, version in since.items() if name in known), None)
    missing = [_IN_WORDS.get(name.rpartition(".")[2], name) for name in sorted(unknown)]
    left_out = f"; without {', '.join(missing)}" if missing else ""
    return f"RayJob ray.io/v1, KubeRay {f'{release} or later' if release else 'before 1.5'}{left_out}"


def nodes_with_image(api: KubernetesApi, image: str) -> tuple[int, int]:
    """How many nodes say that they have this image, and how many there are. A node names its 50 largest at most."""
    nodes = api.nodes()
    return sum(_has_image(node, image) for node in nodes), len(nodes)


def check_gpus(api: KubernetesApi, compute: ComputeConfig) -> str:
    """As many GPUs as workers, on nodes that the workers may use, each with all GPUs of a pod.

    Raises:
        PermissionError: if this account may not see nodes.
        UserError: if there are fewer.
    """
    wanted = compute.kuberay.node_selector.items()
    nodes = [node for node in api.nodes() if wanted <= node["metadata"].get("labels", {}).items()]
    each = [_gpus(node) for node in nodes if not node.get("spec", {}).get("unschedulable")]
    have, size = sum(each), compute.kuberay.workers_per_pod
    room = sum(gpus // size for gpus in each)
    if room < compute.min_pods:
        raise UserError(
            "compute.num_workers",
            f"needs {compute.min_pods} pods of {size} GPUs, and the nodes have room for {room}; GPUs of each node: "
            f"{', '.join(map(str, sorted(each, reverse=True))) or 'none'}",
            value=compute.num_workers,
        )
    return f"{have} GPUs for {compute.max_workers} workers in {compute.max_pods} pods"


def check_queue(api: KubernetesApi, name: str) -> str:
    """Kueue's LocalQueue, ready to admit.

    Raises:
        UserError: if it is not there or not active.
    """
    queue = api.local_queue(name)
    if queue is None:
        raise UserError("compute.kuberay.queue", f"namespace {api.namespace} has no such LocalQueue", value=name)
    conditions = queue.get("status", {}).get("conditions", [])
    active = next((each for each in conditions if each["type"] == "Active"), {"status": "True"})
    if active["status"] != "True":
        reason = active.get("message") or active.get("reason", "")
        raise UserError("compute.kuberay.queue", f"this LocalQueue is not active: {reason}", value=name)
    return f"LocalQueue {name!r} of ClusterQueue {queue['spec']['clusterQueue']!r}"


def _has_image(node: Resource, image: str) -> bool:
    """Whether the node lists the image, perhaps with the registry that a short name stands for."""
    names = [name for each in node.get("status", {}).get("images", []) for name in each.get("names") or []]
    return any(name == image or name in {f"docker.io/{image}", f"docker.io/library/{image}"} for name in names)


def _gpus(node: Resource) -> int:
    return int(node.get("status", {}).get("allocatable", {}).get(GPU, 0))
