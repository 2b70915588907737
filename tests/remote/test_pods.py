"""Why a pod does not run, by its status and events as Kubernetes 1.34 writes them."""

from __future__ import annotations

from typing import Any

import pytest

from ncsn.remote.pods import trouble_of, trouble_of_owner

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


def test_a_pod_that_starts_or_works_has_none() -> None:
    for well in (
        pod(),
        pod(waiting("ContainerCreating")),
        pod({"state": {"running": {}}, "lastState": ended(1)}, phase="Running"),
        pod({"state": ended(0, "Completed")}, phase="Succeeded"),
        pod(conditions=[NO_ROOM | {"reason": "SchedulingGated"}]),
    ):
        assert trouble_of(well, []) is None


def test_pods_that_are_refused_are_told_by_their_owners_events() -> None:
    quota = event("FailedCreate", 'pods "x" is forbidden: exceeded quota: small, requested: requests.memory=6Gi')
    policy = event("FailedToCreateHeadPod", 'pods "x" is forbidden: violates PodSecurity "restricted:latest"')
    refused = trouble_of_owner([quota, policy])
    assert refused is not None and refused.final and refused.reason == "FailedToCreateHeadPod"
    assert trouble_of_owner([quota, event("SuccessfulCreate", "Created pod: x", "Normal")]) is None
