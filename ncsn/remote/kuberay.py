"""A step as a RayJob: create it or attach to one, watch it to its end, show its log, and leave nothing behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

from ncsn.answer import answer
from ncsn.config.compute import ComputeConfig
from ncsn.environment import CONTAINER_IMAGE, IMAGE_VARIABLE, RUN_ID_LABEL
from ncsn.errors import UserError
from ncsn.progress import say
from ncsn.remote.backend import (
    CHECK_SECONDS,
    PATIENCE_SECONDS,
    Check,
    EndedByOther,
    NotConfigured,
    RemoteFailure,
    RemoteLost,
    RemoteStep,
    forwarded_environment,
    is_ours,
    refuse_other_work,
)
from ncsn.remote.kubernetes import INSTALL_KUBERAY, Conflict, KubernetesApi, Resource, is_ending, owner_of
from ncsn.remote.manifest import (
    ATTEMPT_LABEL,
    KFP_RUN_LABEL,
    REQUEST_ANNOTATION,
    TEMPLATE_VARIABLE,
    load_template,
    render,
    selector,
)
from ncsn.remote.pods import PodLog, PodWatch
from ncsn.storage.heartbeat import Heartbeat

STANDALONE = "kubeflow"  # namespace of the runs where Kubeflow Pipelines serves one user
NOTES = "ncsn-runs"  # the ConfigMap of infra/base/janitor: by their id, the pipeline runs that are not closed
NEEDED = (  # what infra/base/rbac/launcher-role.yaml grants
    *((verb, "rayjobs.ray.io") for verb in ("create", "get", "list", "watch", "delete")),
    *((verb, "pods") for verb in ("get", "list")),
    ("get", "pods/log"),
    ("list", "events"),
    ("get", "workflows.argoproj.io"),
    *((verb, "configmaps", NOTES) for verb in ("get", "patch")),
)
POLL_SECONDS = 1.0  # at least, between two looks at a RayJob
LOOK_SECONDS = (10, 20)  # between two looks at its pods, until they run and later; less than a request may take
DELETE_SECONDS = 30.0  # patience of a deletion while a person waits

_AT_ONCE = (2.0, 3.0)  # seconds to connect and to answer, for a process that is being killed
_FINAL = {"Complete", "Failed", "ValidationFailed"}  # KubeRay's own helper lacks the last, and would wait forever


class JobState:
    """The status of a RayJob, and what it means for the step."""

    def __init__(self, rayjob: Resource) -> None:
        status = rayjob.get("status", {})
        self.deployment: str = status.get("jobDeploymentStatus", "")  # what the operator does
        self.job: str = status.get("jobStatus", "")  # what the Ray job does
        self.reason: str = status.get("reason", "")
        self.message = " ".join(status.get("message", "").split())
        self.failed: int = status.get("failed", 0)  # attempts
        self.finished = self.deployment in _FINAL
        # Of a failed job, Complete says only that the operator is done.
        self.succeeded = (self.deployment, self.job) == ("Complete", "SUCCEEDED")
        # It stays for inspection: the operator has rules to delete it later.
        self.kept = self.deployment == "Failed" or (self.deployment, self.job) == ("Complete", "FAILED")

    def __str__(self) -> str:
        return " / ".join(word for word in (self.deployment or "created", self.job) if word)

    def explain(self) -> str:
        return ": ".join(filter(None, (self.reason or str(self), self.message)))


@dataclass(frozen=True)
class Launcher:
    """What a RayJob takes over from the pod of the KFP task that starts it; empty outside of KFP."""

    image: str | None = None
    workflow: str | None = None  # name of the pod's Argo Workflow
    owner: Resource | None = None  # reference to it, which deletes the RayJob with it; not across namespaces
    labels: Mapping[str, str] = field(default_factory=dict)


def find_launcher(api: KubernetesApi) -> Launcher:
    """What is known of the pod of this process. `api` is for the namespace of the RayJobs."""
    name, at_home = os.environ.get("KFP_POD_NAME"), api.namespace == api.own_namespace
    pod = (api if at_home else KubernetesApi(api.own_namespace)).get("pods", name) if name else None
    if pod is None:
        return Launcher()
    owner, run = owner_of(pod), pod["metadata"].get("labels", {}).get(RUN_ID_LABEL)
    # Blocking needs a right on the Workflow's finalizers that the launcher does not have.
    reference = owner | {"controller": False, "blockOwnerDeletion": False} if owner and at_home else None
    images = (container["image"] for container in pod["spec"]["containers"] if container["name"] == "main")
    labels = {KFP_RUN_LABEL: run} if run else {}
    return Launcher(image=next(images, None), workflow=owner.get("name"), owner=reference, labels=labels)


class KubeRay:
    """The backend `kuberay`. `namespace` is the default of `compute.kuberay.namespace`."""

    def __init__(self, compute: ComputeConfig, *, namespace: str | None = None) -> None:
        self._compute = compute
        self._namespace = compute.kuberay.namespace or namespace
        self._launcher = Launcher()
        self._job: Mapping[str, str] = {}  # labels of the RayJob; empty while there is none for this launcher
        self._uid: str | None = None  # of the RayJob; another of its name may be another launcher's

    @cached_property
    def _api(self) -> KubernetesApi:
        return KubernetesApi(self._namespace, patience=PATIENCE_SECONDS)

    def connect(self) -> None:
        _ = self._api

    def execute(self, step: RemoteStep, accepted: Callable[[], None]) -> None:
        """Run the step as a RayJob, or attach to the one that an earlier attempt left; return when it has ended.

        Ctrl-C deletes the RayJob if it `is_ours`. So does SIGTERM, unless it is meant for the pod of this process and
        not for its pipeline. A RayJob that failed stays for as long as the template says.
        """
        self._launcher, self._job = find_launcher(self._api), {}
        self._heart = Heartbeat(step.lease)
        image, name = self._image(), step.job_name
        manifest = render(
            step,
            self._compute,
            namespace=self._api.namespace,
            image=image,
            env=forwarded_environment(to_pods=True) | {CONTAINER_IMAGE: image},
            labels={ATTEMPT_LABEL: self._heart.id, **self._launcher.labels},
            owner=self._launcher.owner,
        )
        with answer.waiting(lambda: self._end_at_once(name)), self._heart:
            try:
                attempt = self._start(step, manifest)
                accepted()
                pods = PodWatch(self._api, f"{ATTEMPT_LABEL}={attempt}", resumes=step.resumes)
                with PodLog(self._api, name, pods, attempt=attempt, uri=step.log) as log:
                    state = self._watch(step, pods, log, attempt)
            except (SystemExit, RemoteLost):  # on SIGTERM the handler has decided
                raise
            except BaseException as error:
                # While the API server or the store is unavailable the work continues; a user's mistake is no outage.
                outage = isinstance(error, OSError) and not isinstance(error, (PermissionError, UserError))
                self._heart.stays = outage
                if isinstance(error, KeyboardInterrupt):
                    self._heart.leave()
                if self._ours and not outage:
                    self._delete(name, KubernetesApi(self._api.namespace, patience=DELETE_SECONDS))
                raise
        mine = attempt == self._heart.id or self._ours
        if mine and not (state.kept and "deletionStrategy" in manifest["spec"]):
            self._api.delete("rayjobs", name, uid=self._uid)
        if not state.succeeded:
            told = str(step.told() or "")
            causes: list[str | None] = [told or log.first_error() or pods.cause or state.explain()]
            if state.reason.endswith("Exceeded") or state.deployment == "ValidationFailed":  # ended by the operator
                causes = [state.message, told]
            why = log.describe(*causes, pods.cause, pods.ended)
            raise RemoteFailure(f"RayJob {name} failed ({state.reason or state}): {why}")

    def stop(self, *, run: str | None, kfp_run: str | None) -> list[str]:
        found = self._api.find("rayjobs", labels=selector(run=run, kfp_run=kfp_run))
        running = [rayjob["metadata"] for rayjob in found if not JobState(rayjob).finished]
        for metadata in running:
            self._api.delete("rayjobs", metadata["name"], uid=metadata["uid"])
        return [metadata["name"] for metadata in running]

    def checks(self) -> Iterator[Check]:
        """What a RayJob will need of the cluster; only the first check if no cluster is configured."""
        try:
            api = KubernetesApi(self._namespace, patience=CHECK_SECONDS)
        except UserError:
            yield Check("kubernetes", lambda: KubernetesApi(self._namespace).server, "export KUBECONFIG=FILE")
            return
        folder = "base/rbac" if api.namespace == STANDALONE else "overlays/multi-user"
        unreachable: Mapping[type[Exception], str] = {ConnectionError: "kubectl cluster-info"}
        needs = f"kubectl apply --kustomize infra/{folder.replace('rbac', 'kuberay')}"
        for_crd = {**unreachable, FileNotFoundError: f"unset {TEMPLATE_VARIABLE}"}
        yield Check("kubernetes", lambda: f"{api.server}, namespace {api.namespace!r}", "")
        yield Check("rights", lambda: _check_rights(api), f"kubectl apply --kustomize infra/{folder}", unreachable)
        yield Check("kuberay", lambda: _check_crd(api), INSTALL_KUBERAY, for_crd)
        yield Check("pod needs", lambda: _check_references(api), needs, for_crd)
        yield Check("pod image", self._image, f"export {IMAGE_VARIABLE}=REGISTRY/ncsn-python:TAG")

    def _image(self) -> str:
        """The image of the Ray pods. Only a pod can find out whether it can be pulled."""
        # That of the launcher's own pod may be the slim one.
        image = self._compute.kuberay.image or os.environ.get(IMAGE_VARIABLE) or self._launcher.image
        if image is None:
            hint = f"set it or {IMAGE_VARIABLE} to the image that `make image` builds"
            raise UserError("compute.kuberay.image", "no image for the Ray pods", hint=hint)
        return image

    @property
    def _ours(self) -> bool:
        """Whether the RayJob ends with this process. Others come and go: to be asked when it matters."""
        job, this_run = self._job, self._launcher.labels.get(KFP_RUN_LABEL)
        return bool(job) and is_ours(self._heart, job.get(KFP_RUN_LABEL), this_run)

    def _start(self, step: RemoteStep, manifest: Resource) -> str:
        """Create the RayJob, or attach to one; the label of its pods, since those of an earlier one may still end."""
        name, made = step.job_name, manifest["metadata"]["labels"]
        while True:
            self._job, self._uid = made, None  # before it exists, because this process may be killed meanwhile
            try:
                self._uid = self._api.create("rayjobs", manifest)["metadata"]["uid"]
                say(f"RayJob {name} created in namespace {self._api.namespace}")
                return str(made[ATTEMPT_LABEL])
            except Conflict:
                self._job = {}
            except (PermissionError, UserError):
                self._job = {}
                raise
            found = self._api.get("rayjobs", name)
            if found is None:
                continue
            state, metadata = JobState(found), found["metadata"]
            going, workflow = "deletionTimestamp" in metadata, owner_of(found).get("name")
            with suppress(PermissionError):
                if not going and workflow not in (None, self._launcher.workflow):
                    # Of a pipeline run that has ended, the janitor deletes it, or Kubernetes with its owner.
                    going = is_ending(self._api.get("workflows", workflow))
            if not going and not state.finished:  # of one that has finished, the step's result was looked for
                if metadata.get("annotations", {}).get(REQUEST_ANNOTATION) != step.request:
                    how = f"kubectl delete rayjob {name} --namespace {self._api.namespace}"
                    raise refuse_other_work(name, how)
                self._job, self._uid = metadata["labels"], metadata["uid"]
                end = "ends it" if self._ours else "leaves it to another launcher"
                say(f"attached to RayJob {name}, which is {state}; Ctrl-C {end}")
                return str(metadata["labels"][ATTEMPT_LABEL])
            self._api.delete("rayjobs", name, uid=metadata["uid"])
            while ((self._api.get("rayjobs", name) or {}).get("metadata") or {}).get("uid") == metadata["uid"]:
                time.sleep(POLL_SECONDS)

    def _watch(self, step: RemoteStep, pods: PodWatch, log: PodLog, attempt: str) -> JobState:
        name, shown, settings = step.job_name, "", self._compute.kuberay
        ran, late = False, time.monotonic() + 60 * settings.max_start_minutes
        while True:
            found = self._api.get("rayjobs", name)
            if found is None or found["metadata"]["labels"][ATTEMPT_LABEL] != attempt:
                mine = attempt == self._heart.id or self._ours
                raise (RemoteLost if mine else EndedByOther)(f"RayJob {name} was deleted while it ran")
            state = JobState(found)
            if str(state) != shown:
                shown = str(state)
                suspended = f", waiting for quota in Kueue's queue {settings.queue}"
                say(f"RayJob {name}: {shown}" + (suspended if state.deployment == "Suspended" else ""))
                log.due.put(None)  # an attempt that has failed is deleted with its log
            if state.finished:
                return state
            if state.failed and (told := step.told()) and told.problems:
                raise RemoteFailure(f"RayJob {name} failed, and another attempt would only repeat the mistake")
            # KubeRay would try again for the same time. It may show the reason for less than a second.
            ran = ran or state.deployment == "Running"
            no_start = state.failed and not ran and time.monotonic() > late
            if no_start or state.reason == "PreRunningDeadlineExceeded":
                raise RemoteFailure(f"RayJob {name} did not start in time: {pods.cause or state.explain()}")
            hopeless = pods.look(found)
            if hopeless and state.deployment in ("", "Initializing"):
                raise RemoteFailure(f"RayJob {name} cannot start: {hopeless}")
            time.sleep(POLL_SECONDS)
            self._api.wait("rayjobs", found, seconds=LOOK_SECONDS[state.deployment == "Running"])

    def _end_at_once(self, name: str) -> None:
        """On SIGTERM: delete the RayJob, unless only this process is to end.

        KFP's Terminate and the eviction of a pod send the same signal. Only the Workflow tells them apart, and an
        evicted pod is started again and attaches to the work. Without a Workflow a person stopped this process.
        """
        if not self._ours:
            return
        ending = self._launcher.workflow is None
        # New clients: a signal handler must not wait for a lock of the client that it interrupts.
        with suppress(ConnectionError, PermissionError, UserError):
            home = KubernetesApi(self._api.own_namespace, patience=0, timeouts=_AT_ONCE)
            ending = ending or is_ending(home.get("workflows", str(self._launcher.workflow)))
        if ending:
            self._delete(name, KubernetesApi(self._api.namespace, patience=0, timeouts=_AT_ONCE))
        else:
            self._heart.stays = True
            say(f"RayJob {name} keeps running: the next attempt attaches to it; with none, it ends with its lease")

    def _delete(self, name: str, api: KubernetesApi) -> None:
        try:
            if self._uid is None:  # the answer to its creation is not known
                found = (api.get("rayjobs", name) or {"metadata": {}})["metadata"]
                if found.get("labels", {}).get(ATTEMPT_LABEL) != self._heart.id:
                    return
                self._uid = found["uid"]
            api.delete("rayjobs", name, uid=self._uid)
            say(f"RayJob {name} deleted")
        except (ConnectionError, PermissionError, UserError) as error:
            self._heart.stays = True
            how = f"to end it before its lease does: kubectl delete rayjob {name} --namespace {api.namespace}"
            say(f"RayJob {name} could not be deleted ({error}); {how}")


def _check_rights(api: KubernetesApi) -> str:
    missing = [" ".join(needed) for needed in NEEDED if not api.allowed(*needed)]
    if missing:
        raise PermissionError(f"this account may not {', '.join(missing)} in namespace {api.namespace!r}")
    return f"{len(NEEDED)} verbs in namespace {api.namespace!r}"


def _check_references(api: KubernetesApi) -> str:
    """Without its account no pod is made; without what is optional it starts, perhaps without addresses or keys."""
    spec = load_template()["spec"]
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    pods = [spec["submitterPodTemplate"]["spec"], *(group["template"]["spec"] for group in groups)]
    required = {f"serviceaccounts {pod.get('serviceAccountName', 'default')}": True for pod in pods}
    for source in (source for pod in pods for source in pod["containers"][0].get("envFrom", [])):
        for kind, reference in (("configmaps", source.get("configMapRef")), ("secrets", source.get("secretRef"))):
            if reference:
                required[f"{kind} {reference['name']}"] = not reference.get("optional", False)
    seen = {each: bool(api.get(*each.split())) if api.allowed("get", *each.split()) else None for each in required}
    missing, hidden = ([each for each in seen if seen[each] is found] for found in (False, None))
    if any(required[each] for each in missing):
        raise UserError(f"namespace {api.namespace}", f"lacks {', '.join(missing)}")
    if missing or hidden:
        lacks = f"lacks {', '.join(missing)}: is it given in another way?" if missing else ""
        raise NotConfigured(lacks or f"this account may not look for {', '.join(hidden)}")
    return ", ".join(seen)


def _check_crd(api: KubernetesApi) -> str:
    """KubeRay 1.6 brought one of the fields that the template uses, and needs no gate for deletion rules."""
    load_template()
    if "preRunningDeadlineSeconds" not in api.rayjob_fields():
        raise UserError("KubeRay", "before 1.6; it lacks fields of the RayJob")
    return "RayJob ray.io/v1, KubeRay 1.6 or later"
