"""The RayJob manifest, from template, config, launcher and task.

The template is `infra/base/kuberay/rayjob.yaml` of the source tree, to which `rayjob.yaml` beside this module is a
link: a wheel carries its content. The image carries it as a file that NCSN_RAYJOB_TEMPLATE names.

KFP hands a component its node selector, tolerations, affinity, environment and volumes as plain pieces of a pod. They
reach this package in an environment variable, as they reach the component: beside the config, not in it, because they
say where the work happens and nothing about its result.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ncsn.config.compute import LEAST_MEMORY, ComputeConfig, KubeRayConfig, bytes_of
from ncsn.errors import NotFound, UserError
from ncsn.remote.backend import command_digest, job_name

if TYPE_CHECKING:
    from ncsn.remote.kubernetes import KubernetesApi


Manifest = dict[str, Any]

TEMPLATE_VARIABLE = "NCSN_RAYJOB_TEMPLATE"
MANAGED_BY = "app.kubernetes.io/managed-by"
RUN_LABEL = "ncsn.dev/run"
STEP_LABEL = "ncsn.dev/step"
KFP_RUN_LABEL = "ncsn.dev/kfp-run-id"
ATTEMPT_LABEL = "ncsn.dev/attempt"
"""Of a RayJob and its pods; another one under the same name has another value."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
REQUEST_ANNOTATION = "ncsn.dev/request"
RENEWED_ANNOTATION = "ncsn.dev/renewed-at"

# Where one of these is unknown, there are no deletion rules, or (KubeRay 1.5) they are behind a gate that is closed and
# the operator refuses a RayJob that has them. 1.6 opened the gate and brought preRunningDeadlineSeconds.
_WITHOUT_RULES = (
    "spec.deletionStrategy",
    "spec.deletionStrategy.deletionRules",
    "spec.preRunningDeadlineSeconds",
)
_OBJECT_STORE_SHARE, _SMALLEST_STORE = 0.9, 75 * 2**20


@dataclass(frozen=True)
class JobRequest:
    """What one RayJob runs.

    Attributes:
        run: Name of the run.
        step: Name of the step.
        uri: Folder of the step in the store; with `run` and `step` it decides the RayJob's name.
        entrypoint: Command and arguments for the head.
        image: Image of every pod.
        env: Addresses for the Ray pods. Never a secret.
        labels: Further labels.
        owner: Owner reference to the workflow that started the step, or None.
    """

    run: str
    step: str
    uri: str
    entrypoint: tuple[str, ...]
    image: str
    env: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    owner: Manifest | None = None

    @property
    def name(self) -> str:
        """The same for every attempt; see `job_name`."""
        return job_name(self.run, self.step, self.uri)

    @property
    def digest(self) -> str:
        """Tells another attempt at the same work from other work under the same name."""
        return command_digest(self.entrypoint)


def load_template(path: str | None = None) -> Manifest:
    """The template at `path`, else at NCSN_RAYJOB_TEMPLATE, else that of this package.

    Raises:
        NotFound: if there is none.
        UserError: if the file holds no RayJob.
    """
    file = Path(path or os.environ.get(TEMPLATE_VARIABLE) or Path(__file__).with_name("rayjob.yaml"))
    if not file.is_file():
        raise NotFound(TEMPLATE_VARIABLE, "no such file", hint="set it to a copy of rayjob.yaml", value=str(file))
    template = yaml.safe_load(file.read_text())
    if not isinstance(template, dict) or template.get("kind") != "RayJob":
        raise UserError(
            TEMPLATE_VARIABLE,
            "not a RayJob",
            hint="set it to a copy of infra/base/kuberay/rayjob.yaml",
            value=str(file),
        )
    return template


def render(template: Manifest, request: JobRequest, *, compute: ComputeConfig, namespace: str) -> Manifest:
    """The RayJob of `request`: `template` with the named fields filled, complete and unbounded in nothing."""
    manifest = copy.deepcopy(template)
    settings = compute.kuberay
    labels = {RUN_LABEL: request.run, STEP_LABEL: request.step, **request.labels}
    _fill_metadata(manifest["metadata"], request, labels=labels, namespace=namespace)
    spec = manifest["spec"]
    spec["entrypoint"] = shlex.join(request.entrypoint)
    spec["activeDeadlineSeconds"] = max(1, round(settings.max_hours * 3600))
    spec["preRunningDeadlineSeconds"] = max(1, round(settings.max_start_minutes * 60))
    _fill_deletion_rules(spec, settings)
    cluster = spec["rayClusterSpec"]
    cluster["rayVersion"] = metadata.version("ray")
    (workers,) = cluster["workerGroupSpecs"]
    workers |= {"replicas": compute.max_pods, "minReplicas": compute.min_pods, "maxReplicas": compute.max_pods}
    head, submitter = cluster["headGroupSpec"]["template"], spec["submitterPodTemplate"]
    for template_ in (head, workers["template"], submitter):
        template_["metadata"]["labels"] |= labels
        (container,) = template_["spec"]["containers"]
        container["image"] = request.image
        if template_ is not submitter:
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
    """The manifest without fields that the cluster's CRD does not know, and the dotted paths of those.

    Args:
        manifest: A rendered RayJob.
        schema: OpenAPI schema of the RayJob that is installed.
    """
    unknown: list[str] = []
    fitted = _known_part(manifest, schema, "", unknown)
    if "deletionStrategy" in manifest["spec"] and any(path in unknown for path in _WITHOUT_RULES):
        fitted["spec"]["deletionStrategy"] = manifest["spec"]["deletionStrategy"]
        _shut_down_by_time(fitted["spec"])
        unknown = [path for path in unknown if not path.startswith("spec.deletionStrategy")] + ["spec.deletionStrategy"]
    return fitted, unknown


def _fill_metadata(node: Manifest, request: JobRequest, *, labels: Mapping[str, str], namespace: str) -> None:
    node["name"], node["namespace"] = request.name, namespace
    node.setdefault("labels", {}).update(labels)
    node.setdefault("annotations", {})[REQUEST_ANNOTATION] = request.digest
    if request.owner is not None:
        node["ownerReferences"] = [request.owner]


def _fill_deletion_rules(spec: Manifest, settings: KubeRayConfig) -> None:
    for rule in spec["deletionStrategy"]["deletionRules"]:
        condition = rule["condition"]
        if rule["policy"] == "DeleteSelf" and condition.get("jobStatus") != "SUCCEEDED":
            condition["ttlSeconds"] = round(settings.keep_failed_minutes * 60)


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
        resources["nvidia.com/gpu"] = str(number)
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
    spec["shutdownAfterJobFinishes"] = True
    spec["ttlSecondsAfterFinished"] = max(
        rule["condition"]["ttlSeconds"] for rule in rules if rule["policy"] == "DeleteSelf"
    )


def _known_part(node: Any, schema: Manifest, path: str, unknown: list[str]) -> Any:
    if isinstance(node, list):
        return [
            _known_part(item, schema.get("items", {}), f"{path}[{index}]", unknown) for index, item in enumerate(node)
        ]
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


_POD_VARIABLE = "KFP_POD_NAME"
_KFP_RUN_POD_LABEL = "pipeline/runid"
# What joins the steps to an MLflow run that KFP opened. Addresses and names; a token is in the Secret of the Ray pods.
_FORWARDED = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_WORKSPACE",
    "MLFLOW_TRACKING_AUTH",
    "NCSN_KFP_RUN_ID",
)
_LOOPBACK = re.compile(r"https?://(localhost|127(\.\d+){3}|\[::1\])(:|/|$)")


@dataclass(frozen=True)
class Launcher:
    """What a RayJob takes over from the pod that starts it.

    Attributes:
        image: Image of the pod, or None.
        workflow: Name of the pod's Argo Workflow, or None.
        owner: Owner reference to it, so that the RayJob goes when the Workflow does; None from another namespace.
        labels: Labels for the RayJob.
    """

    image: str | None = None
    workflow: str | None = None
    owner: dict[str, Any] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def is_told_to_end(self, home: KubernetesApi) -> bool:
        """Whether SIGTERM means the work and not only this process.

        KFP's Terminate and the eviction of a pod send the same signal. Only the Workflow tells them apart, and an
        evicted pod is started again, where it attaches to the work. Without a Workflow somebody stopped this process.

        Args:
            home: The namespace of this pod, without patience.
        """
        if self.workflow is None:
            return True
        try:
            return is_ending(home.workflow(self.workflow))
        except (ConnectionError, PermissionError, ValueError):
            return False


def find_launcher(api: KubernetesApi) -> Launcher:
    """What is known of this pod; nothing where KFP did not start this process.

    Args:
        api: The namespace of the RayJobs.
    """
    name, at_home = os.environ.get(_POD_VARIABLE), api.namespace == api.own_namespace
    pod = (api if at_home else type(api)(api.own_namespace)).pod(name) if name else None
    if pod is None:
        return Launcher()
    owners = [owner for owner in pod["metadata"].get("ownerReferences", []) if owner["kind"] == "Workflow"]
    images = [container["image"] for container in pod["spec"]["containers"] if container["name"] == "main"]
    run = pod["metadata"].get("labels", {}).get(_KFP_RUN_POD_LABEL)
    return Launcher(
        image=images[0] if images else None,
        workflow=owners[0]["name"] if owners else None,
        owner=_owner(owners[0]) if owners and at_home else None,
        labels={KFP_RUN_LABEL: run} if run else {},
    )


def is_ending(workflow: dict[str, Any] | None) -> bool:
    """Whether an Argo Workflow has ended, or somebody is ending it; one that is gone has ended.

    KFP's Terminate sets `spec.activeDeadlineSeconds` to 0, Argo's own stop and terminate set `spec.shutdown`.
    """
    if workflow is None:
        return True
    spec, phase = workflow.get("spec", {}), workflow.get("status", {}).get("phase", "")
    over = phase in {"Succeeded", "Failed", "Error"} or "deletionTimestamp" in workflow["metadata"]
    return over or spec.get("activeDeadlineSeconds") == 0 or bool(spec.get("shutdown"))


def forwarded_environment() -> dict[str, str]:
    """Variables of this process that the job needs. An address with a password in it is not among them."""
    values = {name: os.environ[name] for name in _FORWARDED if os.environ.get(name)}
    return {name: value for name, value in values.items() if "@" not in value}


def environment_for_pods() -> dict[str, str]:
    """The same without addresses of this machine: a port-forward leads nowhere from a pod, which has a ConfigMap."""
    return {name: value for name, value in forwarded_environment().items() if not _LOOPBACK.match(value)}


def _owner(reference: dict[str, Any]) -> dict[str, Any]:
    named = {key: reference[key] for key in ("apiVersion", "kind", "name", "uid")}
    # Blocking needs a right on the Workflow's finalizers that the launcher does not have.
    return named | {"controller": False, "blockOwnerDeletion": False}


TASK_CONFIG = "NCSN_TASK_CONFIG"
"""Variable with the pieces as JSON; the keys are the fields of `kfp.dsl.TaskConfig`."""

_RAY_AUTH = "RAY_AUTH_"


def task_config() -> dict[str, Any]:
    """What the task has set on it; empty outside of KFP."""
    found: dict[str, Any] = json.loads(os.environ.get(TASK_CONFIG) or "{}")
    return found


def with_task_config(manifest: Manifest, task: Mapping[str, Any]) -> Manifest:
    """The RayJob with the pieces on its pods.

    The environment and the volumes go to head and workers, where a name that the pod has already keeps its meaning. The
    rest goes to the workers: what the task sets comes before what the config says, key by key; tolerations add up.

    Ray's token stays behind: a new cluster has one of its own, which KubeRay (1.6.2, 1.7.0) leaves out of a pod that
    names the variable already, and a head without a token does not start.

    Args:
        manifest: A rendered RayJob; it stays as it is.
        task: See `task_config`.
    """
    changed = copy.deepcopy(manifest)
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
    if selector := task.get("node_selector"):
        pod["nodeSelector"] = pod.get("nodeSelector", {}) | selector
    if tolerations := task.get("tolerations"):
        pod["tolerations"] = [*pod.get("tolerations", []), *tolerations]
    if affinity := task.get("affinity"):
        pod["affinity"] = pod.get("affinity", {}) | affinity


def _add_new(node: Manifest, field: str, items: list[Manifest] | None, *, key: str) -> None:
    present = node.get(field, [])
    known = {item[key] for item in present}
    if new := [item for item in items or [] if item[key] not in known]:
        node[field] = [*present, *new]
