"""A step as a RayJob: create it or attach to one, watch it to its end, show its log, and leave nothing behind."""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property

from ncsn import storage
from ncsn.config.compute import ComputeConfig
from ncsn.errors import UserError
from ncsn.process import CONTAINER_IMAGE, IMAGE_VARIABLE
from ncsn.remote.backend import (
    PATIENCE_SECONDS,
    Check,
    Conflict,
    Found,
    RemoteFailure,
    RemoteLost,
    RemoteStep,
    attach_or_start,
    ended_on_sigterm,
    say,
)
from ncsn.remote.checks import kuberay_checks
from ncsn.remote.kubernetes import KubernetesApi, Resource
from ncsn.remote.launcher import Launcher, environment_for_pods, find_launcher, is_ending, workflow_of
from ncsn.remote.manifest import (
    ATTEMPT_LABEL,
    RENEWED_ANNOTATION,
    REQUEST_ANNOTATION,
    JobRequest,
    fit_to_schema,
    load_template,
    render,
    selector,
    task_config,
    with_task_config,
)
from ncsn.remote.pods import PodLog, PodWatch
from ncsn.remote.rayjob_state import JobState, state_of
from ncsn.storage.heartbeat import RENEW_SECONDS, Heartbeat

WATCH_SECONDS = 15.0
DELETE_SECONDS = 30.0  # patience of a deletion while a person waits

_AT_ONCE = (2.0, 3.0)


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
        self._ours = False

    @cached_property
    def _api(self) -> KubernetesApi:
        return KubernetesApi(self._namespace, patience=self._patience)

    def connect(self) -> None:
        """Find the cluster in the environment."""
        _ = self._api

    def execute(self, step: RemoteStep) -> None:
        """Run the step as a RayJob, or attach to the one that an earlier attempt left; return when it has ended.

        Ctrl-C deletes the RayJob. So does SIGTERM, unless it is meant for the pod of this process and not for its
        pipeline; then the next attempt attaches. A RayJob that failed stays for `compute.kuberay.keep_failed_minutes`.
        """
        # Separate clients, made now: the signal handler must not wait for a lock of the client that it interrupts.
        self._heart = KubernetesApi(self._api.namespace, patience=0)
        self._impatient = KubernetesApi(self._api.namespace, patience=0, timeouts=_AT_ONCE)
        self._home = KubernetesApi(self._api.own_namespace, patience=0, timeouts=_AT_ONCE)
        self._launcher = find_launcher(self._api)
        manifest = self._manifest(step)
        name, request = manifest["metadata"]["name"], manifest["metadata"]["annotations"][REQUEST_ANNOTATION]
        beat = Heartbeat(step.lease, also=lambda: self._annotate(name), every=self._renew_seconds)
        with ended_on_sigterm(lambda: self._end_at_once(name)), beat:
            with self._deleted_if_left(name):
                attempt = attach_or_start(request, start=lambda: self._create(manifest), find=lambda: self._find(name))
                pods = PodWatch(self._api, f"{ATTEMPT_LABEL}={attempt}")
                with PodLog(self._api, name, attempt=attempt, uri=storage.join(step.uri, "log.txt")) as log:
                    state = self._watch(name, step, pods)
                    log.finish()
                    cause = _cause(state, pods, log)
            if not (state.kept and "deletionStrategy" in manifest["spec"]):
                self._api.delete_rayjob(name)
            if not state.succeeded:
                how = state.reason or state.describe()
                raise RemoteFailure(f"RayJob {name} failed ({how}): {cause}; log {log.uri}")

    def stop(self, *, run: str | None, kfp_run: str | None) -> list[str]:
        """Delete the running RayJobs of a run, or of a run of KFP; their names. What failed stays for inspection."""
        rayjobs = self._api.list_rayjobs(selector(run=run, kfp_run=kfp_run))
        names = [rayjob["metadata"]["name"] for rayjob in rayjobs if not state_of(rayjob).finished]
        for name in names:
            self._api.delete_rayjob(name)
        return names

    def checks(self) -> Iterator[Check]:
        """What a RayJob needs."""
        return kuberay_checks(self._compute)

    def _manifest(self, step: RemoteStep) -> Resource:
        image = self._compute.kuberay.image or self._launcher.image or os.environ.get(IMAGE_VARIABLE)
        if image is None:
            raise UserError(
                "compute.kuberay.image",
                "no image for the Ray pods",
                hint=f"set it or {IMAGE_VARIABLE} to the image that `make image` builds",
            )
        request = JobRequest(
            run=step.run,
            step=step.step,
            uri=step.uri,
            entrypoint=step.leased_command,
            image=image,
            env=environment_for_pods() | {CONTAINER_IMAGE: image},
            labels={ATTEMPT_LABEL: uuid.uuid4().hex, **self._launcher.labels},
            owner=self._launcher.owner,
        )
        manifest = render(load_template(), request, compute=self._compute, namespace=self._api.namespace)
        manifest = with_task_config(manifest, task_config())
        manifest["metadata"]["annotations"][RENEWED_ANNOTATION] = _now()
        fitted, unknown = fit_to_schema(manifest, self._api.rayjob_schema())
        if unknown:
            say(f"not in the RayJob, because this cluster's KubeRay does not have it: {', '.join(unknown)}")
        return fitted

    def _create(self, manifest: Resource) -> str:
        """Create the RayJob; the label of its pods, because those of an earlier one of this name may still end."""
        name = manifest["metadata"]["name"]
        self._ours = True  # before it exists, because this process may be killed meanwhile
        try:
            self._api.create_rayjob(manifest)
        except (Conflict, PermissionError, UserError):
            self._ours = False
            raise
        say(f"RayJob {name} created in namespace {self._api.namespace}")
        return str(manifest["metadata"]["labels"][ATTEMPT_LABEL])

    def _find(self, name: str) -> Found[str] | None:
        rayjob = self._api.rayjob(name)
        if rayjob is None:
            return None
        state, metadata = state_of(rayjob), rayjob["metadata"]
        going = "deletionTimestamp" in metadata or self._belongs_to_ended_pipeline(rayjob)

        def attach() -> str:
            self._ours = True
            self._annotate(name)
            return str(metadata["labels"][ATTEMPT_LABEL])

        def clear() -> None:
            self._api.delete_rayjob(name)
            while (left := self._api.rayjob(name)) is not None:
                self._api.wait_for_change(left, seconds=WATCH_SECONDS)

        return Found(
            kind="RayJob",
            name=name,
            state=state.describe(),
            request=metadata.get("annotations", {}).get(REQUEST_ANNOTATION, ""),
            attachable=not going and (state.succeeded or not state.finished),
            running=not going and not state.finished,
            attach=attach,
            clear=clear,
            how_to_end=f"kubectl delete rayjob {name} --namespace {self._api.namespace}",
        )

    def _belongs_to_ended_pipeline(self, rayjob: Resource) -> bool:
        """Whether its pipeline run has ended: then the janitor deletes it, or Kubernetes with its owner."""
        workflow = workflow_of(rayjob)
        if workflow is None or workflow == self._launcher.workflow:
            return False
        with suppress(PermissionError):
            return is_ending(self._api.workflow(workflow))
        return False

    def _watch(self, name: str, step: RemoteStep, pods: PodWatch) -> JobState:
        """Wait for the end of the RayJob: its status is read, not derived from events."""
        shown, start, queue = "", _Start(self._compute.kuberay.max_start_minutes), self._compute.kuberay.queue
        while True:
            found = self._api.rayjob(name)
            if found is None:
                raise RemoteLost(f"RayJob {name} was deleted while it ran")
            state = state_of(found)
            if state.describe() != shown:
                shown = state.describe()
                suspended = queue and state.deployment == "Suspended"
                say(f"RayJob {name}: {shown}" + (f", waiting for quota in Kueue's queue {queue}" if suspended else ""))
            if state.finished:
                return state
            if state.failed and step.mistaken():
                raise RemoteFailure(f"RayJob {name} failed, and another attempt would only repeat the mistake")
            if start.has_failed(state):  # KubeRay would try again for the same time
                raise RemoteFailure(f"RayJob {name} did not start in time: {pods.cause or state.explain()}")
            hopeless = pods.look(found)
            if hopeless and state.starting:
                raise RemoteFailure(f"RayJob {name} cannot start: {hopeless}")
            self._api.wait_for_change(found, seconds=WATCH_SECONDS)

    def _annotate(self, name: str) -> None:
        """Renew the lease in the cluster too, where `ncsn cleanup` looks."""
        with suppress(ConnectionError, PermissionError, UserError):
            self._heart.annotate_rayjob(name, {RENEWED_ANNOTATION: _now()})

    def _end_at_once(self, name: str) -> None:
        if not self._ours:
            return
        if not self._launcher.is_told_to_end(self._home):
            say(f"RayJob {name} keeps running: the next attempt attaches to it; with none, it ends with its lease")
            return
        self._delete(name, self._impatient)

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
            api.delete_rayjob(name)
        except BaseException as error:
            why = f"{type(error).__name__}: {error}".partition(";")[0]
            say(
                f"RayJob {name} could not be deleted ({why}); its driver ends when its lease expires; to end it now: "
                f"kubectl delete rayjob {name} --namespace {api.namespace}"
            )
            if not isinstance(error, (ConnectionError, PermissionError, UserError)):
                raise
        else:
            say(f"RayJob {name} deleted")


def _cause(state: JobState, pods: PodWatch, log: PodLog) -> str:
    """The driver's error, unless the operator ended it."""
    if state.ended_by_operator:
        return "; ".join(filter(None, (" ".join(state.message.split()), pods.cause)))
    return log.first_error() or pods.cause or state.explain()


class _Start:
    """Notices that a cluster did not start in time. KubeRay reports it only for a moment, which a poll may miss."""

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
