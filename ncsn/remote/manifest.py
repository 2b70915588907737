"""The RayJob manifest, from template, config, launcher and task.

The template is `infra/base/kuberay/rayjob.yaml` of the source tree; `rayjob.yaml` in this package is a link to it, and
a wheel contains its content. The image carries it as a file that NCSN_RAYJOB_TEMPLATE names.

KFP hands a component its node selector, tolerations, affinity, environment and volumes as parts of a pod. They reach
this package in an environment variable, as they reach the component. They are not in the config, because they say where
the work happens and nothing about its result.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import yaml

from ncsn.config import NOT_YAML
from ncsn.config.compute import LEAST_MEMORY, ComputeConfig, KubeRayConfig, bytes_of
from ncsn.errors import NotFound, UserError
from ncsn.remote.backend import command_digest, job_name

Manifest = dict[str, Any]

GPU = "nvidia.com/gpu"
TEMPLATE_VARIABLE = "NCSN_RAYJOB_TEMPLATE"
MANAGED_BY = "app.kubernetes.io/managed-by"
RUN_LABEL = "ncsn.dev/run"
STEP_LABEL = "ncsn.dev/step"
KFP_RUN_LABEL = "ncsn.dev/kfp-run-id"
ATTEMPT_LABEL = "ncsn.dev/attempt"  # of a RayJob and its pods; another RayJob of the same name has another value
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
REQUEST_ANNOTATION = "ncsn.dev/request"
RENEWED_ANNOTATION = "ncsn.dev/renewed-at"
TASK_CONFIG = "NCSN_TASK_CONFIG"  # variable with KFP's parts as JSON; the keys are the fields of kfp.dsl.TaskConfig

# Where one of these is unknown, there are no deletion rules, or (KubeRay 1.5) they are behind a gate that is closed and
# the operator refuses a RayJob that has them. 1.6 opened the gate and brought preRunningDeadlineSeconds.
_WITHOUT_RULES = {"spec.deletionStrategy", "spec.deletionStrategy.deletionRules", "spec.preRunningDeadlineSeconds"}
_OBJECT_STORE_SHARE, _SMALLEST_STORE = 0.9, 75 * 2**20
_RAY_AUTH = "RAY_AUTH_"


@dataclass(frozen=True)
class JobRequest:
    """What one RayJob runs."""

    run: str
    step: str
    uri: str  # folder of the step in the store; with run and step it decides the name
    entrypoint: tuple[str, ...]
    image: str
    env: Mapping[str, str] = field(default_factory=dict)  # addresses for the Ray pods; never a secret
    labels: Mapping[str, str] = field(default_factory=dict)
    owner: Manifest | None = None  # reference to the Workflow that started the step

    @property
    def name(self) -> str:
        """The same for every attempt."""
        return job_name(self.run, self.step, self.uri)

    @property
    def digest(self) -> str:
        """Tells another attempt at the same work from other work under the same name."""
        return command_digest(self.entrypoint)


def selector(*, run: str | None = None, kfp_run: str | None = None) -> str:
    """Selects the objects of ncsn: all, those of a run, those of a run of KFP."""
    wanted = {MANAGED_BY: "ncsn", RUN_LABEL: run, KFP_RUN_LABEL: kfp_run}
    return ",".join(f"{label}={value}" for label, value in wanted.items() if value)


def load_template() -> Manifest:
    """The template at NCSN_RAYJOB_TEMPLATE, else that of this package."""
    file = Path(os.environ.get(TEMPLATE_VARIABLE) or Path(__file__).with_name("rayjob.yaml"))
    if not file.is_file():
        raise NotFound(TEMPLATE_VARIABLE, "no such file", hint="set it to a copy of rayjob.yaml", value=str(file))
    try:
        template = yaml.safe_load(file.read_text())
    except NOT_YAML as error:
        raise UserError(TEMPLATE_VARIABLE, f"not valid YAML: {error}", value=str(file)) from None
    if not isinstance(template, dict) or template.get("kind") != "RayJob":
        hint = "set it to a copy of infra/base/kuberay/rayjob.yaml"
        raise UserError(TEMPLATE_VARIABLE, "not a RayJob", hint=hint, value=str(file))
    return template


def render(template: Manifest, request: JobRequest, *, compute: ComputeConfig, namespace: str) -> Manifest:
    """The RayJob of `request`: the template with the named fields filled, and a limit on everything."""
    manifest = copy.deepcopy(template)
    settings = compute.kuberay
    labels = {RUN_LABEL: request.run, STEP_LABEL: request.step, **request.labels}
    node = manifest["metadata"]
    node |= {"name": request.name, "namespace": namespace, "labels": node.get("labels", {}) | labels}
    node.setdefault("annotations", {})[REQUEST_ANNOTATION] = request.digest
    if request.owner is not None:
        node["ownerReferences"] = [request.owner]
    spec = manifest["spec"]
    spec["entrypoint"] = shlex.join(request.entrypoint)
    spec["activeDeadlineSeconds"] = max(1, round(settings.max_hours * 3600))
    spec["preRunningDeadlineSeconds"] = max(1, round(settings.max_start_minutes * 60))
    for rule in spec["deletionStrategy"]["deletionRules"]:
        if rule["policy"] == "DeleteSelf" and rule["condition"].get("jobStatus") != "SUCCEEDED":
            rule["condition"]["ttlSeconds"] = round(settings.keep_failed_minutes * 60)
    cluster = spec["rayClusterSpec"]
    cluster["rayVersion"] = metadata.version("ray")
    (workers,) = cluster["workerGroupSpecs"]
    workers |= {"replicas": compute.max_pods, "minReplicas": compute.min_pods, "maxReplicas": compute.max_pods}
    head, submitter = cluster["headGroupSpec"]["template"], spec["submitterPodTemplate"]
    for pod in (head, workers["template"], submitter):
        pod["metadata"]["labels"] |= labels
        (container,) = pod["spec"]["containers"]
        container["image"] = request.image
        if pod is not submitter:
            container["env"] += [{"name": name, "value": value} for name, value in sorted(request.env.items())]
    _fill_head_pod(head["spec"], settings)
    _fill_worker_pod(workers["template"]["spec"], compute)
    # Ray would take 30 % of the pod's memory, and a folder on disk where /dev/shm has less.
    shm = settings.workers_per_pod * bytes_of(settings.shm_per_worker)
    store = max(_SMALLEST_STORE, int(shm * _OBJECT_STORE_SHARE))
    workers["rayStartParams"]["object-store-memory"] = str(store)
    if settings.queue is not None:
        manifest["metadata"]["labels"][QUEUE_LABEL] = settings.queue
        _shut_down_by_time(spec)
    return manifest


def fit_to_schema(manifest: Manifest, schema: Manifest) -> tuple[Manifest, list[str]]:
    """The manifest without fields that the OpenAPI schema of the installed RayJob lacks, and their dotted paths."""
    unknown: list[str] = []
    fitted = _known_part(manifest, schema, "", unknown)
    if "deletionStrategy" in manifest["spec"] and not _WITHOUT_RULES.isdisjoint(unknown):
        fitted["spec"]["deletionStrategy"] = manifest["spec"]["deletionStrategy"]
        _shut_down_by_time(fitted["spec"])
        unknown = [path for path in unknown if not path.startswith("spec.deletionStrategy")] + ["spec.deletionStrategy"]
    return fitted, unknown


def _fill_head_pod(pod: Manifest, settings: KubeRayConfig) -> None:
    size = {"cpu": settings.head_cpus and str(settings.head_cpus), "memory": settings.head_memory}
    resources = pod["containers"][0]["resources"]
    for kind in ("requests", "limits"):
        resources[kind] |= {name: amount for name, amount in size.items() if amount is not None}


def _fill_worker_pod(pod: Manifest, compute: ComputeConfig) -> None:
    settings = compute.kuberay
    number, memory = settings.workers_per_pod, settings.memory_per_worker or LEAST_MEMORY
    resources = {"cpu": str(number * compute.cpus_per_worker), "memory": _times(number, memory)}
    if compute.use_gpu:
        resources[GPU] = str(number)
    pod["containers"][0]["resources"] = {"requests": dict(resources), "limits": dict(resources)}
    (shm,) = (volume for volume in pod["volumes"] if volume["name"] == "shm")
    shm["emptyDir"]["sizeLimit"] = _times(number, settings.shm_per_worker)
    if settings.node_selector:
        pod["nodeSelector"] = pod.get("nodeSelector", {}) | settings.node_selector
    if settings.tolerations:
        more = [toleration.model_dump(exclude_none=True) for toleration in settings.tolerations]
        pod["tolerations"] = [*pod.get("tolerations", []), *more]


def _times(count: int, quantity: str) -> str:
    number = quantity.rstrip("MGTi")
    return f"{(count * Decimal(number)).normalize():f}{quantity.removeprefix(number)}"


def _shut_down_by_time(spec: Manifest) -> None:
    """Replace the deletion rules by the older pair of fields, which Kueue insists on."""
    rules = spec.pop("deletionStrategy")["deletionRules"]
    waits = [rule["condition"]["ttlSeconds"] for rule in rules if rule["policy"] == "DeleteSelf"]
    spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"] = True, max(waits)


def _known_part(node: Any, schema: Manifest, path: str, unknown: list[str]) -> Any:
    if isinstance(node, list):
        items = schema.get("items", {})
        return [_known_part(item, items, f"{path}[{index}]", unknown) for index, item in enumerate(node)]
    known = schema.get("properties")
    if not isinstance(node, dict) or known is None or schema.get("x-kubernetes-preserve-unknown-fields"):
        return node
    fitted = {}
    for key, value in node.items():
        below = f"{path}.{key}" if path else key
        if key in known:
            fitted[key] = _known_part(value, known[key], below, unknown)
        else:
            unknown.append(below)
    return fitted


def task_config() -> dict[str, Any]:
    """The parts of a pod that KFP holds for this task; empty outside of KFP."""
    return cast("dict[str, Any]", json.loads(os.environ.get(TASK_CONFIG) or "{}"))


def with_task_config(manifest: Manifest, task: Mapping[str, Any]) -> Manifest:
    """A copy of the RayJob with the parts of `task_config` on its pods.

    The environment and the volumes go to head and workers, where a name that the pod already has keeps its meaning. The
    rest goes to the workers: the task's values replace the config's, key by key; tolerations add up.
    """
    changed = copy.deepcopy(manifest)
    # A new cluster has its own token. KubeRay (1.6.2, 1.7.0) leaves it out of a pod that already names the variable,
    # and a head without a token does not start.
    env = [each for each in task.get("env") or [] if not each["name"].startswith(_RAY_AUTH)]
    cluster = changed["spec"]["rayClusterSpec"]
    workers = [group["template"]["spec"] for group in cluster["workerGroupSpecs"]]
    for pod in (cluster["headGroupSpec"]["template"]["spec"], *workers):
        _add_new(pod, "volumes", task.get("volumes"), key="name")
        for container in pod["containers"]:
            _add_new(container, "env", env, key="name")
            _add_new(container, "volumeMounts", task.get("volume_mounts"), key="mountPath")
    for pod in workers:
        _place(pod, task)
    return changed


def _place(pod: Manifest, task: Mapping[str, Any]) -> None:
    for place, key in (("nodeSelector", "node_selector"), ("affinity", "affinity")):
        if task.get(key):
            pod[place] = pod.get(place, {}) | task[key]
    if tolerations := task.get("tolerations"):
        pod["tolerations"] = [*pod.get("tolerations", []), *tolerations]


def _add_new(node: Manifest, field: str, items: list[Manifest] | None, *, key: str) -> None:
    present = node.get(field, [])
    known = {item[key] for item in present}
    if new := [item for item in items or [] if item[key] not in known]:
        node[field] = [*present, *new]
