"""Steps as RayJobs: create or attach to one, watch it to its end, show its log, and leave nothing behind."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import UTC, datetime

import urllib3
from kubernetes.client.exceptions import ApiException

from ncsn import storage
from ncsn.cluster.api import KubernetesApi, Resource
from ncsn.cluster.backend import Conflict, RemoteFailure, RemoteLost, RemoteStep, ended_on_sigterm, say
from ncsn.cluster.driver_log import first_error
from ncsn.cluster.job_state import JobState, state_of
from ncsn.cluster.launcher import environment_for_pods, find_launcher
from ncsn.cluster.pod_log import PodLog
from ncsn.cluster.rayjob_manifest import (
    RENEWED_ANNOTATION,
    REQUEST_ANNOTATION,
    JobRequest,
    fit_to_schema,
    load_template,
    render,
)
from ncsn.cluster.task_config import task_config, with_task_config
from ncsn.config.compute import ComputeConfig
from ncsn.lease import LEASE_SECONDS, RENEW_SECONDS, Heartbeat

WATCH_SECONDS = 60.0
_IMAGE_VARIABLE = "NCSN_IMAGE"


class KubeRay:
    """The backend `kuberay`.

    Args:
        compute: Size of the cluster and the settings of its RayJobs.
        api: The cluster; the one that the environment names by default.
        renew_seconds: How often the lease is renewed.
        lease_seconds: Silence after which the driver saves and ends by itself.
    """

    def __init__(
        self,
        compute: ComputeConfig,
        *,
        api: KubernetesApi | None = None,
        renew_seconds: float = RENEW_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._compute = compute
        self._api = api or KubernetesApi(compute.kuberay.namespace)
        # The heartbeat must not wait for an API server that is away: the lease in the store counts.
        self._impatient = KubernetesApi(self._api.namespace, patience=0)
        self._renew_seconds, self._lease_seconds = renew_seconds, lease_seconds
        self._ours = False

    def execute(self, step: RemoteStep) -> None:
        """Run the step as a RayJob, or attach to the one that an earlier attempt left; return when it is done.

        SIGTERM and Ctrl-C delete the RayJob. A RayJob that failed stays for `compute.kuberay.keep_failed_minutes`.

        Raises:
            RemoteFailure: if it ended without success, with the reason in one line.
            PermissionError: naming the verb that the account lacks.
            ConnectionError: if the API server has not answered for long.
            ValueError: if the cluster has no KubeRay, refuses the manifest, or the name is taken by other work.
        """
        lease = storage.join(step.uri, "lease.json")
        manifest = self._manifest(step, lease)
        name = manifest["metadata"]["name"]
        beat = Heartbeat(lease, also=lambda: self._annotate(name), every=self._renew_seconds, lease=self._lease_seconds)
        with ended_on_sigterm(lambda: self._delete_ours(name)), beat:
            self._create_or_adopt(manifest)
            with PodLog(self._api, name, uri=storage.join(step.uri, "driver.log")) as log:
                state = self._watch_or_delete(name, step, log)
                # What failed stays to be looked at, if the operator has rules to delete it later.
                if not (state.kept and "deletionStrategy" in manifest["spec"]):
                    self._api.delete_rayjob(name)
                if not state.succeeded:
                    cause = first_error(log.lines()) or state.explain()
                    how = state.reason or state.describe()
                    raise RemoteFailure(f"RayJob {name} failed ({how}): {cause}; log {log.uri}")

    def _manifest(self, step: RemoteStep, lease: str) -> Resource:
        launcher = find_launcher(self._api)
        image = self._compute.kuberay.image or launcher.image or os.environ.get(_IMAGE_VARIABLE)
        if image is None:
            raise ValueError(
                f"no image for the Ray pods; set compute.kuberay.image or {_IMAGE_VARIABLE} to that of `make image`"
            )
        request = JobRequest(
            run=step.run,
            step=step.step,
            uri=step.uri,
            entrypoint=(*step.command, "--lease", lease),
            image=image,
            env=environment_for_pods() | {"NCSN_CONTAINER_IMAGE": image},
            labels=launcher.labels,
            owner=launcher.owner,
        )
        manifest = render(load_template(), request, compute=self._compute, namespace=self._api.namespace)
        manifest = with_task_config(manifest, task_config())
        manifest["metadata"]["annotations"][RENEWED_ANNOTATION] = _now()
        fitted, unknown = fit_to_schema(manifest, self._api.rayjob_schema())
        if unknown:
            say(f"left out, because this cluster's KubeRay does not know it: {', '.join(unknown)}")
        return fitted

    def _create_or_adopt(self, manifest: Resource) -> None:
        """Create the RayJob; 409 means that an earlier attempt, or a request whose answer was lost, created it."""
        name = manifest["metadata"]["name"]
        digest = manifest["metadata"]["annotations"][REQUEST_ANNOTATION]
        while True:
            try:
                self._ours = True
                self._api.create_rayjob(manifest)
            except Conflict:
                self._ours = False
            else:
                say(f"RayJob {name} created in namespace {self._api.namespace}")
                return
            found = self._api.rayjob(name)
            if found is None:
                continue
            state, same = state_of(found), found["metadata"].get("annotations", {}).get(REQUEST_ANNOTATION) == digest
            going = "deletionTimestamp" in found["metadata"]
            if not going and same and (state.succeeded or not state.finished):
                self._ours = True
                say(f"attached to RayJob {name}, which is {state.describe()}")
                self._annotate(name)
                return
            if not going and not state.finished:
                raise ValueError(
                    f"RayJob {name} is at work on other inputs of the same step; wait for it, or delete it: "
                    f"kubectl delete rayjob {name} --namespace {self._api.namespace}"
                )
            self._api.delete_rayjob(name)
            self._wait_until_gone(name)

    def _wait_until_gone(self, name: str) -> None:
        while (found := self._api.rayjob(name)) is not None:
            self._api.wait_for_change(name, since=found["metadata"]["resourceVersion"], seconds=WATCH_SECONDS)

    def _watch_or_delete(self, name: str, step: RemoteStep, log: PodLog) -> JobState:
        try:
            state = self._watch(name, step)
            log.finish()
        except BaseException:
            self._delete_at_once(name)
            raise
        return state

    def _watch(self, name: str, step: RemoteStep) -> JobState:
        """Wait for the end of the RayJob. What counts is its status as read, not the events on the way."""
        shown = ""
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
            self._api.wait_for_change(name, since=found["metadata"]["resourceVersion"], seconds=WATCH_SECONDS)

    def _reason_to_wait(self, state: JobState) -> str:
        queue = self._compute.kuberay.queue
        return f", waiting for quota in Kueue's queue {queue}" if queue and state.deployment == "Suspended" else ""

    def _annotate(self, name: str) -> None:
        """Say in the cluster too that somebody waits: `ncsn reap` looks there."""
        with suppress(ConnectionError, PermissionError, ValueError):
            self._impatient.annotate_rayjob(name, {RENEWED_ANNOTATION: _now()})

    def _delete_at_once(self, name: str) -> None:
        try:
            self._impatient.delete_rayjob_at_once(name)
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            say(f"RayJob {name} could not be deleted ({type(error).__name__}); its driver ends when the lease is stale")

    def _delete_ours(self, name: str) -> None:
        if self._ours:
            self._delete_at_once(name)


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
