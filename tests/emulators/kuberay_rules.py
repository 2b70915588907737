"""What the schemas of KubeRay's CRDs refuse, and what this project asks of every Ray pod."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

Manifest = dict[str, Any]

UNBOUNDED = 2147483647
EVICTION = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|KEY|CREDENTIAL", re.IGNORECASE)


def load_schemas(kind: str) -> dict[str, Manifest]:
    """KubeRay version -> JSON schema of `kind`, in NCSN_CRD_SCHEMAS or beside the checkout; empty where is none."""
    named = os.environ.get("NCSN_CRD_SCHEMAS")
    folder = Path(named) if named else Path(__file__).parents[2].parent / "shared" / "crds"
    files = sorted(folder.glob(f"{kind.lower()}-v*.json"))
    return {file.stem.partition("-v")[2]: json.loads(file.read_text()) for file in files}


def schema_errors(manifest: Manifest, schema: Manifest) -> list[str]:
    """What the API server would refuse, one line each."""
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def house_errors(job: Manifest) -> list[str]:
    """What would work and must not: unbounded, privileged, token-bearing or secret-bearing pods."""
    return list(_house_errors(job["spec"]))


def _house_errors(spec: Manifest) -> Iterator[str]:
    cluster = spec["rayClusterSpec"]
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    if "activeDeadlineSeconds" not in spec:
        yield "no activeDeadlineSeconds"
    if not (spec.get("deletionStrategy") or spec.get("shutdownAfterJobFinishes")):
        yield "nothing deletes the cluster when the job is over"
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "the head computes: rayStartParams.num-cpus is not '0'"
    if "nvidia.com/gpu" in json.dumps(head["template"]["spec"]["containers"][0]["resources"]):
        yield "the head has GPUs"
    for group in groups:
        if not {"replicas", "minReplicas", "maxReplicas"} <= group.keys() or group["maxReplicas"] == UNBOUNDED:
            yield f"worker group {group['groupName']} is unbounded"
    pods = {"submitter": spec["submitterPodTemplate"], "head": head["template"]}
    pods |= {group["groupName"]: group["template"] for group in groups}
    if len({container["image"] for pod in pods.values() for container in pod["spec"]["containers"]}) != 1:
        yield "the pods have different images"
    for name, pod in pods.items():
        yield from (f"{name}: {error}" for error in _pod_errors(pod, ray=name != "submitter"))


def _pod_errors(pod: Manifest, *, ray: bool) -> Iterator[str]:
    spec = pod["spec"]
    if ray and not EVICTION.items() <= pod["metadata"].get("annotations", {}).items():
        yield "an autoscaler may move it"
    if pod.get("metadata", {}).get("labels", {}).get("sidecar.istio.io/inject") != "false":
        yield "a sidecar may be injected"
    if spec.get("automountServiceAccountToken") is not False:
        yield "the service account's token is mounted"
    if spec.get("securityContext", {}).get("runAsNonRoot") is not True:
        yield "it may run as root"
    memory = {volume["name"] for volume in spec.get("volumes", []) if _is_sized_memory(volume)}
    for container in spec["containers"]:
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
        if not container.get("securityContext", {}).get("readOnlyRootFilesystem") or "/tmp" not in mounts:
            yield "more than volumes is writable, or /tmp is not"
        if ray and mounts.get("/dev/shm") not in memory:
            yield "/dev/shm is not a sized memory volume"
        if not {"cpu", "memory"} <= container.get("resources", {}).get("limits", {}).keys():
            yield "no limit on CPU and memory"
        for variable in container.get("env", []):
            if "value" in variable and SECRET_NAME.search(variable["name"]):
                yield f"a secret may stand in {variable['name']}"


def _is_sized_memory(volume: Manifest) -> bool:
    directory = volume.get("emptyDir", {})
    return directory.get("medium") == "Memory" and "sizeLimit" in directory
