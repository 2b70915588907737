"""The RayJob manifest, from template, config, launcher and task.

The template is `infra/base/kuberay/rayjob.yaml` of the source tree; `rayjob.yaml` in this package is a link to it, and
a wheel contains its content. The image carries it as a file that NCSN_RAYJOB_TEMPLATE names.

KFP hands a component its node selector, tolerations, affinity, environment and volumes as parts of a pod. They reach
this package in an environment variable, as they reach the component. They are not in the config, because they say where
the work happens and nothing about its result.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from ncsn.config import read_yaml
from ncsn.config.compute import LEAST_MEMORY, ComputeConfig, bytes_of
from ncsn.errors import InvalidValue, NotFound, UserError
from ncsn.remote.backend import RemoteStep

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
TASK_CONFIG = "NCSN_TASK_CONFIG"  # variable with KFP's parts as JSON; the keys are the fields of kfp.dsl.TaskConfig

_OBJECT_STORE_SHARE, _SMALLEST_STORE = 0.9, 75 * 2**20


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
        template = read_yaml(file.read_text())
    except InvalidValue:
        template = None
    if not isinstance(template, dict) or template.get("kind") != "RayJob":
        hint = "set it to a copy of infra/base/kuberay/rayjob.yaml"
        raise UserError(TEMPLATE_VARIABLE, "not a RayJob", hint=hint, value=str(file))
    return template


def task_config() -> dict[str, Any]:
    """The parts of a pod that KFP holds for this task; empty outside of KFP."""
    return cast("dict[str, Any]", json.loads(os.environ.get(TASK_CONFIG) or "{}"))


def render(
    step: RemoteStep,
    compute: ComputeConfig,
    *,
    namespace: str,
    image: str,
    env: Mapping[str, str],
    labels: Mapping[str, str],
    owner: Manifest | None = None,
) -> Manifest:
    """The RayJob of a step: the template with the fields filled that it names, and the parts of `task_config`.

    `env` has addresses for the Ray pods, never a secret; `owner` refers to the Workflow that started the step.
    """
    manifest, settings = load_template(), compute.kuberay
    labels = {RUN_LABEL: step.run, STEP_LABEL: step.step, **labels}
    node, spec = manifest["metadata"], manifest["spec"]
    node |= {"name": step.job_name, "namespace": namespace, "labels": node.get("labels", {}) | labels}
    node.setdefault("annotations", {})[REQUEST_ANNOTATION] = step.request
    if owner is not None:
        node["ownerReferences"] = [owner]
    # Ray itself would run whatever is at the URI by then.
    checked = () if step.code is None else ("python", "-P", "-m", "ncsn.runs.code", step.code)
    spec["entrypoint"] = shlex.join((*checked, *step.leased_command))
    spec["activeDeadlineSeconds"] = max(1, round(settings.max_hours * 3600))
    spec["preRunningDeadlineSeconds"] = max(1, round(settings.max_start_minutes * 60))
    cluster = spec["rayClusterSpec"]
    cluster["rayVersion"] = metadata.version("ray")
    (workers,) = cluster["workerGroupSpecs"]
    least, most = (count // settings.workers_per_pod for count in (compute.min_workers, compute.max_workers))
    workers |= {"replicas": most, "minReplicas": least, "maxReplicas": most}
    head, worker, submitter = cluster["headGroupSpec"]["template"], workers["template"], spec["submitterPodTemplate"]
    for pod in (head, worker, submitter):
        pod["metadata"]["labels"] |= labels
        pod["spec"]["containers"][0]["image"] = image
        if settings.priority_class is not None:
            pod["spec"]["priorityClassName"] = settings.priority_class
    size = {"cpu": settings.head_cpus and str(settings.head_cpus), "memory": settings.head_memory}
    for amounts in head["spec"]["containers"][0]["resources"].values():
        amounts |= {name: amount for name, amount in size.items() if amount is not None}
    store = _fill_worker(worker["spec"], compute)
    workers["rayStartParams"]["object-store-memory"] = str(store)
    _take_over(task_config(), head["spec"], worker["spec"], [{"name": key, "value": env[key]} for key in sorted(env)])
    if settings.queue is not None:
        node["labels"][QUEUE_LABEL] = settings.queue
        # Kueue insists on the older pair of fields in place of the deletion rules.
        rules = spec.pop("deletionStrategy")["deletionRules"]
        waits = [rule["condition"]["ttlSeconds"] for rule in rules if rule["policy"] == "DeleteSelf"]
        spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"] = True, max(waits)
    return manifest


def _fill_worker(pod: Manifest, compute: ComputeConfig) -> int:
    """Size and place of a worker pod; bytes for its object store."""
    settings = compute.kuberay
    number, memory = settings.workers_per_pod, settings.memory_per_worker or LEAST_MEMORY
    resources = {"cpu": str(number * compute.cpus_per_worker), "memory": _times(number, memory)}
    if compute.use_gpu:
        resources[GPU] = str(number)
    pod["containers"][0]["resources"] = {"requests": dict(resources), "limits": dict(resources)}
    (shm,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
    shm["sizeLimit"] = _times(number, shm["sizeLimit"])
    if settings.node_selector:
        pod["nodeSelector"] = pod.get("nodeSelector", {}) | settings.node_selector
    if settings.tolerations:
        pod["tolerations"] = [*pod.get("tolerations", []), *settings.tolerations]
    # Ray would take 30 % of the pod's memory, and a folder on disk where /dev/shm has less.
    return max(_SMALLEST_STORE, int(bytes_of(shm["sizeLimit"]) * _OBJECT_STORE_SHARE))


def _times(count: int, quantity: str) -> str:
    number = quantity.rstrip("MGTi")
    return f"{(count * Decimal(number)).normalize():f}{quantity.removeprefix(number)}"


def _take_over(task: Mapping[str, Any], head: Manifest, worker: Manifest, env: Sequence[Manifest]) -> None:
    """Environment and volumes go to both, where a name that the pod has keeps its meaning; the rest to the workers.

    There the task's values replace the config's, key by key; tolerations add up.
    """
    # A new cluster has its own token. KubeRay (1.6.2, 1.7.0) leaves it out of a pod that already names the variable,
    # and a head without a token does not start.
    env = [*env, *(each for each in task.get("env") or [] if not each["name"].startswith("RAY_AUTH_"))]
    for pod in (head, worker):
        _add_new(pod, "volumes", task.get("volumes") or [], key="name")
        _add_new(pod["containers"][0], "env", env, key="name")
        _add_new(pod["containers"][0], "volumeMounts", task.get("volume_mounts") or [], key="mountPath")
    for place, key in (("nodeSelector", "node_selector"), ("affinity", "affinity")):
        if task.get(key):
            worker[place] = worker.get(place, {}) | task[key]
    if tolerations := task.get("tolerations"):
        worker["tolerations"] = [*worker.get("tolerations", []), *tolerations]


def _add_new(node: Manifest, field: str, items: Sequence[Manifest], *, key: str) -> None:
    for item in items:
        if item[key] not in {each[key] for each in node.get(field, [])}:
            node.setdefault(field, []).append(item)
