"""What KubeRay and Kueue refuse although the CRD's schema allows it, and what this project asks of every Ray pod.

Written once: the tests hold every manifest against it, and the emulated operator answers with it. Leaves out what
concerns RayService, GCS fault tolerance and autoscaling beyond their being off.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

Manifest = dict[str, Any]

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
UNBOUNDED = 2147483647
SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|KEY|CREDENTIAL", re.IGNORECASE)


def schema_folder() -> Path | None:
    """Folder of the CRD schemas: NCSN_CRD_SCHEMAS, else `shared/crds` beside the checkout; None if there is none."""
    named = os.environ.get("NCSN_CRD_SCHEMAS")
    folder = Path(named) if named else Path(__file__).parents[2].parent / "shared" / "crds"
    return folder if folder.is_dir() else None


def load_schemas(kind: str) -> dict[str, Manifest]:
    """KubeRay version -> JSON schema of `kind`; empty where there are none."""
    folder = schema_folder()
    files = sorted(folder.glob(f"{kind.lower()}-v*.json")) if folder else []
    return {file.stem.partition("-v")[2]: json.loads(file.read_text()) for file in files}


def schema_errors(manifest: Manifest, schema: Manifest) -> list[str]:
    """What the API server would refuse, one line each."""
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def fill_defaults(job: Manifest) -> None:
    """What the API server adds to a RayJob, by the defaults of the CRDs of KubeRay 1.6.2 and 1.7.0."""
    spec = job["spec"]
    spec.setdefault("submissionMode", "K8sJobMode")
    spec.setdefault("backoffLimit", 0)
    spec.setdefault("ttlSecondsAfterFinished", 0)
    for rule in spec.get("deletionStrategy", {}).get("deletionRules", []):
        rule["condition"].setdefault("ttlSeconds", 0)
    for group in spec.get("rayClusterSpec", {}).get("workerGroupSpecs", []):
        for name, value in {"replicas": 0, "minReplicas": 0, "maxReplicas": UNBOUNDED, "numOfHosts": 1}.items():
            group.setdefault(name, value)


def operator_errors(job: Manifest) -> list[str]:
    """What KubeRay's validation or Kueue's webhook refuses of a RayJob."""
    return list(_operator_errors(job["metadata"], job["spec"]))


def house_errors(job: Manifest) -> list[str]:
    """What would work and must not: unbounded, privileged, token-bearing or secret-bearing pods."""
    return list(_house_errors(job["spec"]))


def _operator_errors(metadata: Manifest, spec: Manifest) -> Iterator[str]:
    if len(metadata["name"]) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", metadata["name"]):
        yield f"metadata.name {metadata['name']!r} is no DNS-1035 label of at most 47 characters"
    shutdown, ttl = spec.get("shutdownAfterJobFinishes", False), spec.get("ttlSecondsAfterFinished", 0)
    selector, cluster = spec.get("clusterSelector"), spec.get("rayClusterSpec")
    mode = spec.get("submissionMode", "K8sJobMode")
    if bool(selector) == bool(cluster):
        yield "exactly one of rayClusterSpec and clusterSelector must be set"
    if ttl and not shutdown:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("suspend") and (not shutdown or selector):
        yield "suspend needs shutdownAfterJobFinishes and no clusterSelector"
    if spec.get("backoffLimit") and (selector or mode == "InteractiveMode"):
        yield "backoffLimit goes with neither clusterSelector nor InteractiveMode"
    if mode == "SidecarMode" and {"clusterSelector", "submitterPodTemplate", "submitterConfig"} & spec.keys():
        yield "SidecarMode takes no clusterSelector, submitterPodTemplate or submitterConfig"
    if not spec.get("entrypoint"):
        yield "entrypoint is empty"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if field in spec and spec[field] <= 0:
            yield f"{field} must be positive"
    yield from _deletion_errors(spec, cluster or {})
    yield from _cluster_errors(cluster or {})
    yield from _queue_errors(metadata, spec, cluster or {})


def _deletion_errors(spec: Manifest, cluster: Manifest) -> Iterator[str]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    if spec.get("shutdownAfterJobFinishes") or spec.get("ttlSecondsAfterFinished"):
        yield "deletionStrategy excludes shutdownAfterJobFinishes and ttlSecondsAfterFinished"
    rules = strategy.get("deletionRules", [])
    if rules and {"onSuccess", "onFailure"} & strategy.keys():
        yield "deletionRules exclude onSuccess and onFailure"
    if cluster.get("enableInTreeAutoscaling") and any(rule["policy"] == "DeleteWorkers" for rule in rules):
        yield "DeleteWorkers does not go with autoscaling"
    yield from _stage_errors(rules)


def _stage_errors(rules: list[Manifest]) -> Iterator[str]:
    order = {"DeleteWorkers": 0, "DeleteCluster": 1, "DeleteSelf": 2}
    stages: dict[str, list[tuple[int, int]]] = {}
    for rule in rules:
        when = {key: value for key, value in rule["condition"].items() if key != "ttlSeconds"}
        if len(when) != 1:
            yield "a deletion rule needs exactly one of jobStatus and jobDeploymentStatus"
        if rule["policy"] in order:
            stage = (order[rule["policy"]], rule["condition"].get("ttlSeconds", 0))
            stages.setdefault(json.dumps(when), []).append(stage)
    for policies in map(sorted, stages.values()):
        if len({policy for policy, _ in policies}) < len(policies):
            yield "a deletion policy stands twice under one condition"
        if [ttl for _, ttl in policies] != sorted(ttl for _, ttl in policies):
            yield "a later deletion has a shorter ttlSeconds than an earlier one"


def _cluster_errors(cluster: Manifest) -> Iterator[str]:
    auth = cluster.get("authOptions", {})
    version = tuple(map(int, re.findall(r"\d+", cluster.get("rayVersion", ""))[:2]))
    if auth.get("mode") == "token" and version < (2, 52):
        yield f"authOptions.mode token needs rayVersion 2.52 or later, not {cluster.get('rayVersion')!r}"
    if auth.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not for RayJobs"
    names = [group["groupName"] for group in cluster.get("workerGroupSpecs", [])]
    if len(set(names)) < len(names):
        yield f"worker groups share a name: {names}"
    for group in cluster.get("workerGroupSpecs", []):
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", UNBOUNDED)
        if not least <= group.get("replicas", 0) <= most:
            yield f"worker group {group['groupName']}: replicas outside minReplicas {least} and maxReplicas {most}"


def _queue_errors(metadata: Manifest, spec: Manifest, cluster: Manifest) -> Iterator[str]:
    if QUEUE_LABEL not in metadata.get("labels", {}):
        return
    if not spec.get("shutdownAfterJobFinishes"):
        yield "Kueue needs shutdownAfterJobFinishes: true"
    if spec.get("clusterSelector"):
        yield "Kueue takes no clusterSelector"
    if len(cluster.get("workerGroupSpecs", [])) > 17:
        yield "Kueue takes at most 17 worker groups"
    elastic = metadata.get("annotations", {}).get("kueue.x-k8s.io/elastic-job") == "true"
    if cluster.get("enableInTreeAutoscaling") and not elastic:
        yield "Kueue takes an autoscaling cluster only with the annotation kueue.x-k8s.io/elastic-job"


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
    if pod.get("metadata", {}).get("labels", {}).get("sidecar.istio.io/inject") != "false":
        yield "a sidecar may be injected"
    if spec.get("automountServiceAccountToken") is not False:
        yield "the service account's token is mounted"
    if spec.get("securityContext", {}).get("runAsNonRoot") is not True:
        yield "it may run as root"
    memory = {volume["name"] for volume in spec.get("volumes", []) if _is_sized_memory(volume)}
    for container in spec["containers"]:
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
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
