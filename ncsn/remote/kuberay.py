"""A step as a RayJob: create it or attach to one, watch it to its end, show its log, and leave nothing behind."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property

from ncsn.config.compute import ComputeConfig
from ncsn.errors import UserError
from ncsn.process import CONTAINER_IMAGE, IMAGE_VARIABLE
from ncsn.remote.backend import (
    PATIENCE_SECONDS,
    Check,
    Conflict,
    RemoteFailure,
    RemoteLost,
    RemoteStep,
    ended_on_sigterm,
    environment_for_pods,
    refuse_other_work,
    say,
)
from ncsn.remote.checks import kuberay_checks
from ncsn.remote.kubernetes import KubernetesApi, Resource
from ncsn.remote.launcher import Launcher, find_launcher, is_ending, workflow_of
from ncsn.remote.manifest import ATTEMPT_LABEL, REQUEST_ANNOTATION, render, selector
from ncsn.remote.pods import PodLog, PodWatch
from ncsn.storage.heartbeat import RENEW_SECONDS, Heartbeat

WATCH_SECONDS = 15.0
DELETE_SECONDS = 30.0  # patience of a deletion while a person waits

_AT_ONCE = (2.0, 3.0)  # seconds to connect and to answer, for a process that is being killed
_FINAL = {"Complete", "Failed", "ValidationFailed"}  # KubeRay's own helper lacks the last, and would wait forever


@dataclass(frozen=True)
class JobState:
    """The status of a RayJob, and what it means for the step."""

    deployment: str = ""  # jobDeploymentStatus: what the operator does
    job: str = ""  # jobStatus: what the Ray job does
    reason: str = ""
    message: str = ""
    failed: int = 0  # attempts

    @classmethod
    def of(cls, rayjob: Resource) -> JobState:
        status = rayjob.get("status", {})
        names = ("jobDeploymentStatus", "jobStatus", "reason", "message")
        return cls(*(status.get(name, "") for name in names), status.get("failed", 0))

    @property
    def finished(self) -> bool:
        return self.deployment in _FINAL

    @property
    def starting(self) -> bool:
        return self.deployment in {"", "Initializing"}

    @property
    def succeeded(self) -> bool:
        """Whether the step did its work; of a failed job, Complete says only that the operator is done."""
        return self.deployment == "Complete" and self.job == "SUCCEEDED"

    @property
    def kept(self) -> bool:
        """Whether it stays for inspection, because the operator has rules to delete it later."""
        return self.deployment == "Failed" or (self.deployment == "Complete" and self.job == "FAILED")

    def __str__(self) -> str:
        return " / ".join(word for word in (self.deployment or "created", self.job) if word)

    def explain(self) -> str:
        return ": ".join(filter(None, (self.reason or str(self), " ".join(self.message.split()))))


class KubeRay:
    """The backend `kuberay`. `namespace` is the default of `compute.kuberay.namespace`."""

    def __init__(
        self,
        compute: ComputeConfig,
        *,
        namespace: str | None = None,
        patience: float = PATIENCE_SECONDS,
        renew_seconds: float = RENEW_SECONDS,
    ) -> None:
        self._compute, self._patience, self._renew_seconds = compute, patience, renew_seconds
        self._namespace = compute.kuberay.namespace or namespace
        self._launcher = Launcher()
        self._ours = False  # whether this process created the RayJob or attached to it

    @cached_property
    def _api(self) -> KubernetesApi:
        return KubernetesApi(self._namespace, patience=self._patience)

    def connect(self) -> None:
        _ = self._api

    def execute(self, step: RemoteStep) -> None:
        """Run the step as a RayJob, or attach to the one that an earlier attempt left; return when it has ended.

        Ctrl-C deletes the RayJob. So does SIGTERM, unless it is meant for the pod of this process and not for its
        pipeline; then the next attempt attaches. A RayJob that failed stays for as long as the template says.
        """
        self._launcher = find_launcher(self._api)
        manifest, name = self._manifest(step), step.job_name
        with (
            ended_on_sigterm(lambda: self._end_at_once(name)),
            Heartbeat(step.lease, every=self._renew_seconds),
            self._deleted_if_left(name),
        ):
            attempt = self._start(step, manifest)
            pods = PodWatch(self._api, f"{ATTEMPT_LABEL}={attempt}")
            with PodLog(self._api, name, attempt=attempt, uri=step.log) as log:
                state = self._watch(step, pods)
                log.finish()
                cause = log.first_error() or pods.cause or state.explain()
                if state.reason.endswith("Exceeded") or state.deployment == "ValidationFailed":  # ended by the operator
                    cause = "; ".join(filter(None, (" ".join(state.message.split()), pods.cause)))
        if not (state.kept and "deletionStrategy" in manifest["spec"]):
            self._api.delete("rayjobs", name)
        if not state.succeeded:
            raise RemoteFailure(f"RayJob {name} failed ({state.reason or state}): {cause}; log {step.log}")

    def stop(self, *, run: str | None, kfp_run: str | None) -> list[str]:
        """Delete the running RayJobs of a run, or of a run of KFP; their names. What failed stays for inspection."""
        rayjobs = self._api.find("rayjobs", labels=selector(run=run, kfp_run=kfp_run))
        names = [rayjob["metadata"]["name"] for rayjob in rayjobs if not JobState.of(rayjob).finished]
        for name in names:
            self._api.delete("rayjobs", name)
        return names

    def checks(self) -> Iterator[Check]:
        return kuberay_checks(self._compute)

    def _manifest(self, step: RemoteStep) -> Resource:
        image = self._compute.kuberay.image or self._launcher.image or os.environ.get(IMAGE_VARIABLE)
        if image is None:
            hint = f"set it or {IMAGE_VARIABLE} to the image that `make image` builds"
            raise UserError("compute.kuberay.image", "no image for the Ray pods", hint=hint)
        return render(
            step,
            self._compute,
            namespace=self._api.namespace,
            image=image,
            env=environment_for_pods() | {CONTAINER_IMAGE: image},
            labels={ATTEMPT_LABEL: uuid.uuid4().hex, **self._launcher.labels},
            owner=self._launcher.owner,
        )

    def _start(self, step: RemoteStep, manifest: Resource) -> str:
        """Create the RayJob, or attach to one; the label of its pods, since those of an earlier one may still end."""
        name = step.job_name
        while True:
            self._ours = True  # before it exists, because this process may be killed meanwhile
            try:
                self._api.create("rayjobs", manifest)
                say(f"RayJob {name} created in namespace {self._api.namespace}")
                return str(manifest["metadata"]["labels"][ATTEMPT_LABEL])
            except Conflict:
                self._ours = False
            except (PermissionError, UserError):
                self._ours = False
                raise
            found = self._api.get("rayjobs", name)
            if found is None:
                continue
            state, metadata = JobState.of(found), found["metadata"]
            going = "deletionTimestamp" in metadata or self._belongs_to_ended_pipeline(found)
            if not going and not state.finished:  # of one that has finished, the step's result was looked for
                if metadata.get("annotations", {}).get(REQUEST_ANNOTATION) != step.request:
                    how = f"kubectl delete rayjob {name} --namespace {self._api.namespace}"
                    raise refuse_other_work("RayJob", name, how)
                self._ours = True
                say(f"attached to RayJob {name}, which is {state}")
                return str(metadata["labels"][ATTEMPT_LABEL])
            self._api.delete("rayjobs", name)
            while (left := self._api.get("rayjobs", name)) is not None:
                self._api.wait_for_change(left, seconds=WATCH_SECONDS)

    def _belongs_to_ended_pipeline(self, rayjob: Resource) -> bool:
        """Whether its pipeline run has ended: then the janitor deletes it, or Kubernetes with its owner."""
        workflow = workflow_of(rayjob)
        if workflow is None or workflow == self._launcher.workflow:
            return False
        with suppress(PermissionError):
            return is_ending(self._api.get("workflows", workflow))
        return False

    def _watch(self, step: RemoteStep, pods: PodWatch) -> JobState:
        """Wait for the end of the RayJob: its status is read, not derived from events."""
        name, shown, queue = step.job_name, "", self._compute.kuberay.queue
        while True:
            found = self._api.get("rayjobs", name)
            if found is None:
                raise RemoteLost(f"RayJob {name} was deleted while it ran")
            state = JobState.of(found)
            if str(state) != shown:
                shown = str(state)
                suspended = queue and state.deployment == "Suspended"
                say(f"RayJob {name}: {shown}" + (f", waiting for quota in Kueue's queue {queue}" if suspended else ""))
            if state.finished:
                return state
            if state.failed and step.mistaken():
                raise RemoteFailure(f"RayJob {name} failed, and another attempt would only repeat the mistake")
            if state.reason == "PreRunningDeadlineExceeded":  # KubeRay would try again for the same time
                raise RemoteFailure(f"RayJob {name} did not start in time: {pods.cause or state.explain()}")
            hopeless = pods.look(found)
            if hopeless and state.starting:
                raise RemoteFailure(f"RayJob {name} cannot start: {hopeless}")
            self._api.wait_for_change(found, seconds=WATCH_SECONDS)

    def _end_at_once(self, name: str) -> None:
        if not self._ours:
            return
        # New clients: a signal handler must not wait for a lock of the client that it interrupts.
        if self._launcher.is_told_to_end(KubernetesApi(self._api.own_namespace, patience=0, timeouts=_AT_ONCE)):
            self._delete(name, KubernetesApi(self._api.namespace, patience=0, timeouts=_AT_ONCE))
        else:
            say(f"RayJob {name} keeps running: the next attempt attaches to it; with none, it ends with its lease")

    @contextmanager
    def _deleted_if_left(self, name: str) -> Iterator[None]:
        """Delete the RayJob when a failure or Ctrl-C leaves the block."""
        try:
            yield
        # On SIGTERM the handler has decided.
        except (SystemExit, RemoteLost):
            raise
        except BaseException as error:
            # While the API server or the store is unavailable the work continues; a user's mistake is no outage.
            outage = isinstance(error, OSError) and not isinstance(error, (PermissionError, UserError))
            if self._ours and not outage:
                self._delete(name, KubernetesApi(self._api.namespace, patience=DELETE_SECONDS))
            raise

    def _delete(self, name: str, api: KubernetesApi) -> None:
        try:
            api.delete("rayjobs", name)
        except (ConnectionError, PermissionError, UserError) as error:
            why = str(error).partition(";")[0]
            say(
                f"RayJob {name} could not be deleted ({why}); its driver ends when its lease expires; to end it now: "
                f"kubectl delete rayjob {name} --namespace {api.namespace}"
            )
        else:
            say(f"RayJob {name} deleted")
