"""Why a pod does not run, by its status and events as Kubernetes 1.34 writes them, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
from rayjobs import STATUSES

from ncsn.remote.kubernetes import KubernetesApi
from ncsn.remote.pods import PodLog, PodWatch, trouble_of, trouble_of_owner

IMAGE = "registry.example/ncsn-python:9"
REFUSAL = (
    f'failed to pull and unpack image "{IMAGE}": failed to resolve reference "{IMAGE}": pull access denied, '
    "repository does not exist or may require authorization"
)


def pod(container: dict[str, Any] | None = None, *, events: Any = (), **status: Any) -> dict[str, Any]:
    """A pod with one container in this state, and its events."""
    known = {"name": "main", "image": IMAGE, "restartCount": 0}
    statuses = {"containerStatuses": [known | container]} if container else {}
    return {"metadata": {"name": "task"}, "events": events, "status": {"phase": "Pending", **statuses, **status}}


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason, "message": message}}, **more}


def ended(code: int, reason: str = "Error") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason}}


def event(reason: str, message: str, kind: str = "Warning") -> dict[str, Any]:
    return {"type": kind, "reason": reason, "message": message}


KILLED = ended(137, "OOMKilled")
BACK_OFF = f'Back-off pulling image "{IMAGE}": ErrImagePull: '
NO_ROOM = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available"}
MOUNT = event("FailedMount", 'MountVolume.SetUp failed for volume "images"')


@pytest.mark.parametrize(
    ("pod", "reason", "final", "words"),
    [
        (pod(waiting("ErrImagePull", REFUSAL)), "ErrImagePull", False, f"image {IMAGE}: "),
        (pod(waiting("ImagePullBackOff", BACK_OFF + REFUSAL)), "ImagePullBackOff", True, "pull access denied"),
        (pod(waiting("ImagePullBackOff", f"{BACK_OFF}i/o timeout")), "ImagePullBackOff", False, "i/o timeout"),
        (pod(waiting("InvalidImageName", "invalid reference format")), "InvalidImageName", True, IMAGE),
        (pod(waiting("CrashLoopBackOff", restartCount=1, lastState=ended(7))), "CrashLoopBackOff", False, " 7 "),
        (pod(waiting("CrashLoopBackOff", restartCount=3, lastState=ended(7))), "CrashLoopBackOff", True, " 7 "),
        (pod(waiting("CrashLoopBackOff", restartCount=2, lastState=KILLED)), "OOMKilled", False, "137"),
        (pod({"state": KILLED}, phase="Running"), "OOMKilled", False, "137"),
        (pod({"state": ended(1)}, phase="Failed"), "Error", False, "1"),
        (pod(conditions=[NO_ROOM]), "Unschedulable", False, "0/1 nodes are available"),
        (pod(phase="Failed", reason="Evicted", message="low on memory"), "Evicted", False, "low on memory"),
        (pod(waiting("ContainerCreating"), events=[event("Scheduled", "", "Normal"), MOUNT]), "FailedMount", False, ""),
    ],
)
def test_what_keeps_a_pod_from_running_is_named(pod: Any, reason: str, *, final: bool, words: str) -> None:
    trouble = trouble_of(pod, pod["events"])
    assert trouble is not None
    assert (trouble.reason, trouble.final) == (reason, final)
    assert words in trouble.message


@pytest.mark.parametrize(
    "well",
    [
        pod(waiting("ContainerCreating")),
        pod({"state": {"running": {}}, "lastState": ended(1)}, phase="Running"),
        pod({"state": ended(0, "Completed")}, phase="Succeeded"),
        pod(conditions=[NO_ROOM | {"reason": "SchedulingGated"}]),
        pod(),
    ],
)
def test_a_pod_that_starts_or_works_has_none(well: dict[str, Any]) -> None:
    assert trouble_of(well, []) is None


def test_pods_that_are_refused_are_told_by_their_owners_events() -> None:
    quota = event("FailedCreate", 'pods "x" is forbidden: exceeded quota: small, requested: requests.memory=6Gi')
    policy = event("FailedToCreateHeadPod", 'pods "x" is forbidden: violates PodSecurity "restricted:latest"')
    refused = trouble_of_owner([quota, policy])
    assert refused is not None and refused.final and refused.reason == "FailedToCreateHeadPod"
    assert trouble_of_owner([quota, event("SuccessfulCreate", "Created pod: x", "Normal")]) is None


@pytest.fixture
def watched(emulation, said) -> tuple[Any, PodWatch, dict[str, Any]]:
    """The cluster, a watch on the pods of its RayJob, which runs, and the RayJob."""
    emulation.add_another_launchers()
    emulation.reach("runs")
    watch = PodWatch(KubernetesApi(), "ncsn.dev/attempt=another", resumes=lambda: "training resumes from images-7")
    return emulation, watch, emulation.jobs[0]


@pytest.mark.parametrize("status", ["runs", "starts"])
def test_the_loss_of_a_head_is_one_line(watched, said: list[str], status: str) -> None:
    """Unless the operator starts another cluster."""
    emulation, watch, rayjob = watched
    emulation.add_head()
    assert watch.look(rayjob) is None and said == []
    again = {"restartCount": 1, "lastState": KILLED}
    emulation.cluster.update("pods", "head", lambda pod: pod["status"]["containerStatuses"][0].update(again))
    for _ in range(2):
        assert watch.look(rayjob | {"status": STATUSES[status]}) is None
    lost = [line for line in said if "training resumes from images-7" in line]
    assert [("OOMKilled" in line, "head" in line) for line in lost] == [(True, True)] * (status == "runs")
    assert "OOMKilled" in str(watch.ended)


def test_what_the_submitter_says_of_the_lost_head_is_left_out_and_the_drivers_own_is_kept(watched) -> None:
    emulation, watch, rayjob = watched
    begins = "Traceback (most recent call last):"
    cut = (begins, "    await y", "RuntimeError: WebSocket connection closed unexpectedly with close code 1006")
    own = [begins, "  File x, line 1", "ValueError: no such data"]
    emulation.add_submitter(log=(*cut, *own))
    watch.look(rayjob)
    log = PodLog(KubernetesApi(), rayjob["metadata"]["name"], watch, attempt="another", uri="")
    assert log.read(over=True) == own
    assert log.read(over=True) == []


def test_a_quota_is_named_once_though_there_is_no_pod(watched, said: list[str]) -> None:
    """Not by what was said of an earlier job."""
    emulation, watch, rayjob = watched
    quota = 'Failed to create head Pod, pods "x" is forbidden: exceeded quota: small, requested: requests.memory=6Gi'
    about = {"involvedObject": {"kind": "Job", "name": rayjob["metadata"]["name"]}, "reason": "FailedCreate"}
    for time, message in (("2999-01-01T00:00:00Z", quota), ("2026-01-01T00:00:00Z", f"an earlier job's: {quota}")):
        times = {"metadata": {"name": time}, "message": message, "lastTimestamp": time}
        emulation.cluster.create("events", about | times)
    for _ in range(2):
        assert watch.look(rayjob) is None
    assert [quota in line and "earlier" not in line for line in said] == [True]
