"""Steps as RayJobs: create or attach to one, watch it to its end, show its log, and leave nothing behind."""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ncsn import storage
from ncsn.config.compute import ComputeConfig
from ncsn.errors import UserError
from ncsn.remote.backend import Conflict, RemoteFailure, RemoteLost, RemoteStep, ended_on_sigterm, say
from ncsn.remote.kubernetes import KubernetesApi, Resource
from ncsn.remote.manifest import (
    ATTEMPT_LABEL,
    RENEWED_ANNOTATION,
    REQUEST_ANNOTATION,
    JobRequest,
    Launcher,
    environment_for_pods,
    find_launcher,
    fit_to_schema,
    is_ending,
    load_template,
    render,
    task_config,
    with_task_config,
)
from ncsn.remote.pods import PodLog, PodWatch
from ncsn.storage.heartbeat import RENEW_SECONDS, Heartbeat

# KubeRay's own helper leaves ValidationFailed out, and who trusts it waits for ever.
_TERMINAL = {"Complete", "Failed", "ValidationFailed"}


@dataclass(frozen=True)
class JobState:
    """The status of a RayJob.

    Attributes:
        deployment: `jobDeploymentStatus`: what the operator does.
        job: `jobStatus`: what the Ray job does.
        reason: Why it failed, one word.
        message: Why it failed, in words.
        failed: Attempts that failed.
    """

    deployment: str
    job: str
    reason: str
    message: str
    failed: int

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.deployment in _TERMINAL

    @property
    def ended_by_operator(self) -> bool:
        """Whether it failed by a limit of the operator and not by what its driver did."""
        return self.reason.endswith("Exceeded") or self.deployment == "ValidationFailed"

    @property
    def starting(self) -> bool:
        """Whether its cluster is being made."""
        return self.deployment in {"", "Initializing"}

    @property
    def succeeded(self) -> bool:
        """Whether the step did its work. Complete says only that the operator is done: the job may have failed."""
        return self.deployment == "Complete" and self.job == "SUCCEEDED"

    @property
    def kept(self) -> bool:
        """Whether the operator deletes it later, by rules that know this state, so that it can be looked at."""
        return self.deployment == "Failed" or (self.deployment == "Complete" and self.job == "FAILED")

    def describe(self) -> str:
        """`Running / RUNNING`."""
        return " / ".join(word for word in (self.deployment or "created", self.job) if word)

    def explain(self) -> str:
        """Why it ended without success."""
        why = self.reason or self.describe()
        return f"{why}: {' '.join(self.message.split())}" if self.message else why


def state_of(rayjob: dict[str, Any]) -> JobState:
    """The state of a RayJob as the API server returned it."""
    status = rayjob.get("status", {})
    return JobState(
        deployment=status.get("jobDeploymentStatus", ""),
        job=status.get("jobStatus", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        failed=status.get("failed", 0),
    )


WATCH_SECONDS = 15.0
DELETE_SECONDS = 30.0
"""For so long a RayJob is deleted while the API server is away, where a person waits."""

_AT_ONCE = (2.0, 3.0)
_IMAGE_VARIABLE = "NCSN_IMAGE"


class KubeRay:
    """The backend `kuberay`.

    Args:
        compute: Size of the cluster and the settings of its RayJobs.
        api: The cluster; the one that the environment names by default.
        renew_seconds: How often the lease is renewed.
    """

    def __init__(
        self, compute: ComputeConfig, *, api: KubernetesApi | None = None, renew_seconds: float = RENEW_SECONDS
    ) -> None:
        self._compute = compute
        self._api = api or KubernetesApi(compute.kuberay.namespace)
        # Neither the heartbeat nor a process that is being killed waits for an API server that is away.
        self._heart = KubernetesApi(self._api.namespace, patience=0)
        self._impatient = KubernetesApi(self._api.namespace, patience=0, timeouts=_AT_ONCE)
        self._home = KubernetesApi(self._api.own_namespace, patience=0, timeouts=_AT_ONCE)
        self._renew_seconds = renew_seconds
        self._launcher = Launcher()
        self._ours = False

    def execute(self, step: RemoteStep) -> None:
        """Run the step as a RayJob, or attach to the one that an earlier attempt left; return when it is done.

        Ctrl-C deletes the RayJob. So does SIGTERM, unless it is meant for the pod of this process and not for its
        pipeline; then the next attempt attaches. A RayJob that failed stays for `compute.kuberay.keep_failed_minutes`.

        Raises:
            RemoteFailure: if it ended without success or cannot start, with the reason in one line.
            PermissionError: naming the verb that the account lacks.
            ConnectionError: if the API server has not answered for long.
            UserError: if the cluster has no KubeRay, refuses the manifest, or the name is taken by other work.
        """
        lease = storage.join(step.uri, "lease.json")
        self._launcher = find_launcher(self._api)
        manifest = self._manifest(step, lease)
        name = manifest["metadata"]["name"]
        beat = Heartbeat(lease, also=lambda: self._annotate(name), every=self._renew_seconds)
        with ended_on_sigterm(lambda: self._end_at_once(name)), beat:
            with self._deleted_if_left(name):
                attempt = self._create_or_adopt(manifest)
                pods = PodWatch(self._api, f"{ATTEMPT_LABEL}={attempt}")
                with PodLog(self._api, name, attempt=attempt, uri=storage.join(step.uri, "driver.log")) as log:
                    state = self._watch(name, step, pods)
                    log.finish()
                    cause = _cause(state, pods, log)
            # What failed stays to be looked at, if the operator has rules to delete it later.
            if not (state.kept and "deletionStrategy" in manifest["spec"]):
                self._api.delete_rayjob(name)
            if not state.succeeded:
                how = state.reason or state.describe()
                raise RemoteFailure(f"RayJob {name} failed ({how}): {cause}; log {log.uri}")

    def _manifest(self, step: RemoteStep, lease: str) -> Resource:
        image = self._compute.kuberay.image or self._launcher.image or os.environ.get(_IMAGE_VARIABLE)
        if image is None:
            raise UserError(
                "compute.kuberay.image",
                "no image for the Ray pods",
                hint=f"set it or {_IMAGE_VARIABLE} to the image that `make image` builds",
            )
        request = JobRequest(
            run=step.run,
            step=step.step,
            uri=step.uri,
            entrypoint=(*step.command, "--lease", lease),
            image=image,
            env=environment_for_pods() | {"NCSN_CONTAINER_IMAGE": image},
            labels={ATTEMPT_LABEL: uuid.uuid4().hex, **self._launcher.labels},
            owner=self._launcher.owner,
        )
        manifest = render(load_template(), request, compute=self._compute, namespace=self._api.namespace)
        manifest = with_task_config(manifest, task_config())
        manifest["metadata"]["annotations"][RENEWED_ANNOTATION] = _now()
        fitted, unknown = fit_to_schema(manifest, self._api.rayjob_schema())
        if unknown:
            say(f"left out, because this cluster's KubeRay does not know it: {', '.join(unknown)}")
        return fitted

    def _create_or_adopt(self, manifest: Resource) -> str:
        """Create the RayJob; 409 means that an earlier attempt, or a request whose answer was lost, created it.

        Returns:
            What labels its pods; those of an earlier RayJob of the same name may still be ending.
        """
        name = manifest["metadata"]["name"]
        digest = manifest["metadata"]["annotations"][REQUEST_ANNOTATION]
        while True:
            try:
                self._ours = True
                self._api.create_rayjob(manifest)
            except Conflict:
                self._ours = False
            except (PermissionError, ValueError):
                self._ours = False
                raise
            else:
                say(f"RayJob {name} created in namespace {self._api.namespace}")
                return str(manifest["metadata"]["labels"][ATTEMPT_LABEL])
            found = self._api.rayjob(name)
            if found is None:
                continue
            state, same = state_of(found), found["metadata"].get("annotations", {}).get(REQUEST_ANNOTATION) == digest
            going = "deletionTimestamp" in found["metadata"] or self._goes_with_another_pipeline(found)
            if not going and same and (state.succeeded or not state.finished):
                self._ours = True
                say(f"attached to RayJob {name}, which is {state.describe()}")
                self._annotate(name)
                return str(found["metadata"]["labels"][ATTEMPT_LABEL])
            if not going and not state.finished:
                raise UserError(
                    name,
                    "this RayJob runs the same step on other inputs",
                    hint=f"wait for it, or delete it: kubectl delete rayjob {name} --namespace {self._api.namespace}",
                )
            self._api.delete_rayjob(name)
            self._wait_until_gone(name)

    def _goes_with_another_pipeline(self, rayjob: Resource) -> bool:
        """Whether it belongs to a pipeline run that has ended: the janitor deletes it, or Kubernetes its owner."""
        owners = [each["name"] for each in rayjob["metadata"].get("ownerReferences", []) if each["kind"] == "Workflow"]
        if not owners or owners[0] == self._launcher.workflow:
            return False
        with suppress(PermissionError):
            return is_ending(self._api.workflow(owners[0]))
        return False

    def _wait_until_gone(self, name: str) -> None:
        while (found := self._api.rayjob(name)) is not None:
            self._api.wait_for_change(name, since=found["metadata"]["resourceVersion"], seconds=WATCH_SECONDS)

    def _watch(self, name: str, step: RemoteStep, pods: PodWatch) -> JobState:
        """Wait for the end of the RayJob. What counts is its status as read, not the events on the way."""
        shown, start = "", _Start(self._compute.kuberay.max_start_minutes)
        while True:
            found = self._api.rayjob(name)
            if found is None:
                raise RemoteLost(f"RayJob {name} was deleted while it was at work")
            state = state_of(found)
            if state.describe() != shown:
                shown = state.describe()
                say(f"RayJob {name}: {shown}{self._reason_to_wait(state)}")
            if state.finished:
                return state
            if state.failed and step.mistaken():
                raise RemoteFailure(f"RayJob {name} failed, and another attempt would only repeat the mistake")
            if start.has_failed(state):  # KubeRay would try again, for as long
                raise RemoteFailure(f"RayJob {name} did not start in time: {pods.cause or state.explain()}")
            hopeless = pods.look(found)
            if hopeless and state.starting:
                raise RemoteFailure(f"RayJob {name} cannot start: {hopeless}")
            self._api.wait_for_change(name, since=found["metadata"]["resourceVersion"], seconds=WATCH_SECONDS)

    def _reason_to_wait(self, state: JobState) -> str:
        queue = self._compute.kuberay.queue
        return f", waiting for quota in Kueue's queue {queue}" if queue and state.deployment == "Suspended" else ""

    def _annotate(self, name: str) -> None:
        """Say in the cluster too that somebody waits: `ncsn reap` looks there."""
        with suppress(ConnectionError, PermissionError, ValueError):
            self._heart.annotate_rayjob(name, {RENEWED_ANNOTATION: _now()})

    def _end_at_once(self, name: str) -> None:
        """For SIGTERM, after which KFP leaves less than a second."""
        if not self._ours:
            return
        if not self._launcher.is_told_to_end(self._home):
            say(f"RayJob {name} goes on; the next attempt attaches to it, else it ends when the lease is stale")
            return
        self._delete(name, self._impatient)

    @contextmanager
    def _deleted_if_left(self, name: str) -> Iterator[None]:
        """Delete the RayJob when a failure or Ctrl-C leaves the block.

        On SIGTERM that is decided already, and while the API server is away the work goes on.
        """
        try:
            yield
        except (SystemExit, ConnectionError, RemoteLost):
            raise
        except BaseException:
            if self._ours:
                self._delete(name, KubernetesApi(self._api.namespace, patience=DELETE_SECONDS))
            raise

    def _delete(self, name: str, api: KubernetesApi) -> None:
        try:
            api.delete_rayjob(name)
        except BaseException as error:
            why = f"{type(error).__name__}: {error}".partition(";")[0]
            say(
                f"RayJob {name} could not be deleted ({why}); its driver ends when the lease is stale, or: "
                f"kubectl delete rayjob {name} --namespace {api.namespace}"
            )
            if not isinstance(error, (ConnectionError, PermissionError, ValueError)):
                raise
        else:
            say(f"RayJob {name} deleted")


def _cause(state: JobState, pods: PodWatch, log: PodLog) -> str:
    """The driver's own error, unless it was the operator that ended it."""
    if state.ended_by_operator:
        return "; ".join(filter(None, (" ".join(state.message.split()), pods.cause)))
    return log.first_error() or pods.cause or state.explain()


class _Start:
    """Sees that a cluster did not start in time. KubeRay says so for a moment only, which a look may miss."""

    def __init__(self, minutes: float) -> None:
        self._enough = 0.9 * 60 * minutes
        self._failed: int | None = None
        self._began = math.inf

    def has_failed(self, state: JobState) -> bool:
        if state.reason == "PreRunningDeadlineExceeded":
            return True
        now, another = time.monotonic(), self._failed is not None and state.failed > self._failed
        late = another and now - self._began > self._enough
        if not state.starting:
            self._began = math.inf
        elif another or self._began == math.inf:
            self._began = now
        self._failed = state.failed
        return late


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
