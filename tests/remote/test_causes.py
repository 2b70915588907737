"""The cause of a failure: in a pod's status and events as Kubernetes 1.34 writes them, and in a driver's log."""

from __future__ import annotations

from typing import Any

import pytest

from ncsn.remote.backend import first_error
from ncsn.remote.pods import end_of, trouble_of, trouble_of_owner

IMAGE = "registry.example/ncsn-python:9"
REFUSAL = (
    f'failed to pull and unpack image "{IMAGE}": failed to resolve reference "{IMAGE}": pull access denied, '
    "repository does not exist or may require authorization"
)


def pod(container: dict[str, Any] | None = None, *, events: Any = (), **status: Any) -> dict[str, Any]:
    """A pod with one container in this state, and its events."""
    statuses = (
        {"containerStatuses": [{"name": "main", "image": IMAGE, "restartCount": 0, **container}]} if container else {}
    )
    return {
        "metadata": {"name": "task"},
        "events": events,
        "status": {"phase": "Pending", **statuses, **status},
    }


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason, "message": message}}, **more}


def ended(code: int, reason: str = "Error") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason}}


def event(reason: str, message: str, kind: str = "Warning") -> dict[str, Any]:
    return {"type": kind, "reason": reason, "message": message}


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
        (pod(waiting("ErrImageNeverPull", "not present")), "ErrImageNeverPull", True, IMAGE),
        (pod(waiting("CrashLoopBackOff", restartCount=1, lastState=ended(7))), "CrashLoopBackOff", False, " 7 "),
        (pod(waiting("CrashLoopBackOff", restartCount=3, lastState=ended(7))), "CrashLoopBackOff", True, " 7 "),
        (
            pod(waiting("CrashLoopBackOff", restartCount=2, lastState=ended(137, "OOMKilled"))),
            "OOMKilled",
            False,
            "137",
        ),
        (pod({"state": ended(137, "OOMKilled")}, phase="Running"), "OOMKilled", False, "137"),
        (pod({"state": ended(1)}, phase="Running"), "Error", False, "1"),
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


def test_how_a_container_ended_that_runs_again_is_kept() -> None:
    again = {"state": {"running": {}}, "restartCount": 1}
    lost = end_of(pod({**again, "lastState": ended(137, "OOMKilled")}, phase="Running"))
    assert lost is not None and (lost.reason, lost.final) == ("OOMKilled", False) and "137" in lost.message
    assert end_of(pod({**again, "lastState": ended(0, "Completed")}, phase="Running")) is None
    assert end_of(pod({"state": {"running": {}}}, phase="Running")) is None


def test_pods_that_are_refused_are_told_by_their_owners_events() -> None:
    quota = event("FailedCreate", 'pods "x" is forbidden: exceeded quota: small, requested: requests.memory=6Gi')
    policy = event("FailedToCreateHeadPod", 'pods "x" is forbidden: violates PodSecurity "restricted:latest"')
    refused = trouble_of_owner([quota])
    assert refused is not None and not refused.final and "exceeded quota" in refused.message
    refused = trouble_of_owner([quota, policy])
    assert refused is not None and refused.final and refused.reason == "FailedToCreateHeadPod"
    assert trouble_of_owner([quota, event("SuccessfulCreate", "Created pod: x", "Normal")]) is None


TRACEBACK = "Traceback (most recent call last):"
WORKER = "\x1b[36m(RayTrainWorker pid=7, ip=10.0.0.2)\x1b[0m"


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["fine", "images_seen 320"], None),
        ([TRACEBACK, '  File "x.py", line 1', "ValueError: no such data"], "ValueError: no such data"),
        (
            [
                f"(TrainController pid=3) {TRACEBACK}",
                "(TrainController pid=3) ray.exceptions.GetTimeoutError: Get timed out",
                f"{WORKER} {TRACEBACK}",
                f"{WORKER} torch.OutOfMemoryError: CUDA out of memory",
                TRACEBACK,
                "RuntimeError: a worker died",
            ],
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        (["error: first", "error: disk full: no space left to write x"], "disk full: no space left to write x"),
        (["ValueError: not in a traceback"], None),
    ],
    ids=["success", "traceback", "worker", "ncsn's own", "no traceback"],
)
def test_the_first_traceback_is_the_cause_else_what_ncsn_said(lines: list[str], cause: str | None) -> None:
    assert first_error(lines) == cause
