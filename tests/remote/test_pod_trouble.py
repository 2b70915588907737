"""The cause of a pod that does not run, from statuses and events as Kubernetes 1.34 writes them."""

from __future__ import annotations

from typing import Any

import pytest

from ncsn.remote.pods import trouble_of, trouble_of_owner

IMAGE = "registry.example/ncsn-python:9"
REFUSAL = (
    f'failed to pull and unpack image "{IMAGE}": failed to resolve reference "{IMAGE}": pull access denied, '
    "repository does not exist or may require authorization"
)


def pod(container: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    """A pod with one container in this state."""
    statuses = {"containerStatuses": [{"name": "main", "restartCount": 0, **container}]} if container else {}
    return {
        "metadata": {"name": "task"},
        "spec": {"restartPolicy": "Always", "containers": [{"name": "main", "image": IMAGE}]},
        "status": {"phase": "Pending", **statuses, **status},
    }


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason, "message": message}}, **more}


def ended(code: int, reason: str = "Error") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason}}


def event(reason: str, message: str, kind: str = "Warning") -> dict[str, Any]:
    return {"type": kind, "reason": reason, "message": message}


@pytest.mark.parametrize(
    ("reason", "message", "final"),
    [
        ("ErrImagePull", REFUSAL, False),
        ("ImagePullBackOff", f'Back-off pulling image "{IMAGE}": ErrImagePull: {REFUSAL}', True),
        ("ImagePullBackOff", f'Back-off pulling image "{IMAGE}": ErrImagePull: dial tcp: i/o timeout', False),
        ("InvalidImageName", f'Failed to apply default image tag "{IMAGE}": invalid reference format', True),
        ("ErrImageNeverPull", f'Container image "{IMAGE}" is not present with pull policy of Never', True),
    ],
)
def test_an_image_that_cannot_be_pulled_is_named(reason: str, message: str, *, final: bool) -> None:
    trouble = trouble_of(pod(waiting(reason, message)), [])
    assert trouble is not None
    assert (trouble.reason, trouble.final) == (reason, final)
    assert trouble.message.startswith(f"image {IMAGE}: ")


@pytest.mark.parametrize(("restarts", "final"), [(1, False), (3, True)])
def test_a_crash_loop_has_its_exit_code(restarts: int, *, final: bool) -> None:
    state = waiting("CrashLoopBackOff", "back-off 10s", restartCount=restarts, lastState=ended(7))
    trouble = trouble_of(pod(state, phase="Running"), [])
    assert trouble is not None
    assert (trouble.reason, trouble.container, trouble.final) == ("CrashLoopBackOff", "main", final)
    assert "7" in trouble.message.split()


@pytest.mark.parametrize(
    "container",
    [
        {"state": ended(137, "OOMKilled")},
        waiting("CrashLoopBackOff", restartCount=2, lastState=ended(137, "OOMKilled")),
    ],
)
def test_a_container_that_was_killed_for_memory_says_so(container: dict[str, Any]) -> None:
    trouble = trouble_of(pod(container, phase="Running"), [])
    assert trouble is not None and trouble.reason == "OOMKilled" and "137" in trouble.message


@pytest.mark.parametrize(("policy", "final"), [("Never", True), ("Always", False)])
def test_the_end_of_a_container_is_final_where_it_is_not_started_again(policy: str, *, final: bool) -> None:
    over = pod({"state": ended(1)}, phase="Running")
    over["spec"]["restartPolicy"] = policy
    trouble = trouble_of(over, [])
    assert trouble is not None and (trouble.reason, trouble.final) == ("Error", final)


def test_the_schedulers_words_are_kept() -> None:
    words = "0/1 nodes are available: 1 Insufficient memory."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    trouble = trouble_of(pod(conditions=[condition]), [])
    assert trouble is not None and not trouble.final
    assert (trouble.reason, trouble.message) == ("Unschedulable", words)
    assert trouble_of(pod(conditions=[condition | {"reason": "SchedulingGated"}]), []) is None


def test_an_evicted_pod_is_over() -> None:
    trouble = trouble_of(pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory."), [])
    assert trouble is not None and not trouble.final, "its owner makes another"
    assert (trouble.reason, trouble.message) == ("Evicted", "The node was low on resource: memory.")


def test_a_volume_that_does_not_mount_is_told_by_an_event() -> None:
    mount = event("FailedMount", 'MountVolume.SetUp failed for volume "images"')
    trouble = trouble_of(pod(waiting("ContainerCreating")), [event("Scheduled", "", "Normal"), mount])
    assert trouble is not None and trouble.reason == "FailedMount" and not trouble.final


@pytest.mark.parametrize(
    "well",
    [
        pod(waiting("ContainerCreating")),
        pod({"state": {"running": {}}, "lastState": ended(1)}, phase="Running"),
        pod({"state": ended(0, "Completed")}, phase="Succeeded"),
        pod(),
    ],
)
def test_a_pod_that_starts_or_works_has_none(well: dict[str, Any]) -> None:
    assert trouble_of(well, []) is None


def test_pods_that_are_refused_are_told_by_their_owners_events() -> None:
    quota = event("FailedCreate", 'pods "x" is forbidden: exceeded quota: small, requested: requests.memory=6Gi')
    policy = event("FailedToCreateHeadPod", 'pods "x" is forbidden: violates PodSecurity "restricted:latest"')
    refused = trouble_of_owner([quota])
    assert refused is not None and not refused.final and "exceeded quota" in refused.message
    refused = trouble_of_owner([quota, policy])
    assert refused is not None and refused.final and refused.reason == "FailedToCreateHeadPod"
    assert trouble_of_owner([quota, event("SuccessfulCreate", "Created pod: x", "Normal")]) is None
