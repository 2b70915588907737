"""Why a pod does not run, in one line: read from its status and its events, as `kubectl describe` shows them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Resource = dict[str, Any]

_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
# A registry that is away or busy may answer later; one that knows the image's name and says no will say it again.
_REFUSED_IMAGE = re.compile(
    r"not found|no such host|manifest unknown|denied|unauthorized|authorization failed|invalid reference", re.IGNORECASE
)
_REPEATED_NAME = re.compile(r'failed to (pull and unpack image|resolve reference) "[^"]*": ')  # containerd's
_CRASHES_THAT_TELL = 3
_STATUSES = {"initContainers": "initContainerStatuses", "containers": "containerStatuses"}
_VOLUMES_AND_SANDBOX = {"FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"}
_REFUSED_POD = re.compile(r"^Failed(Create$|ToCreate(Head|Worker)Pod$)")
_CREATED_POD = re.compile(r"^(SuccessfulCreate|Created(Head|Worker)Pod)$")
_UNUSED_QUOTA = re.compile(r"exceeded quota.* used: (\S+,)?[^,\s]+=0[,\s]")  # no other pod makes room by its end
_PASSING_REFUSAL = re.compile(
    r"exceeded quota|time(d )?out|deadline exceeded|try again|connection refused|no endpoints available|internal error",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Trouble:
    """What keeps a pod from running, or has ended it.

    Attributes:
        reason: One word of Kubernetes: ImagePullBackOff, CrashLoopBackOff, Unschedulable, OOMKilled, Evicted, ...
        message: One line with the details: the image's name, the exit code, the scheduler's words.
        final: Whether waiting does not help.
        container: The container that it is about, whose log may say more; empty if none has started.
    """

    reason: str
    message: str
    final: bool
    container: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def trouble_of(pod: Resource, events: Sequence[Resource]) -> Trouble | None:
    """What is wrong with a pod; None if it runs, has succeeded, or is just starting.

    Args:
        pod: The pod as the API server returns it.
        events: The events of this pod, oldest first.
    """
    status = pod.get("status", {})
    if status.get("phase") == "Failed" and status.get("reason"):
        return Trouble(status["reason"], _one_line(status.get("message", "")), final=True)
    for container in (each for kind in _STATUSES.values() for each in status.get(kind, [])):
        if trouble := _trouble_of_container(container, pod["spec"], events):
            return trouble
    return _trouble_of_pending(status, events) if status.get("phase", "Pending") == "Pending" else None


def trouble_of_owner(events: Sequence[Resource]) -> Trouble | None:
    """Why an object that owns pods (a Job, a RayCluster) gets none, such as a quota; None if its last one was made.

    Args:
        events: The events of this object, oldest first.
    """
    for event in reversed(events):
        if _CREATED_POD.match(event.get("reason", "")):
            return None
        if _REFUSED_POD.match(event.get("reason", "")):
            message = _one_line(event.get("message", ""))
            passing = _PASSING_REFUSAL.search(message) and not _UNUSED_QUOTA.search(message)
            return Trouble(event["reason"], message, final=not passing)
    return None


def _trouble_of_container(container: Resource, spec: Resource, events: Sequence[Resource]) -> Trouble | None:
    name = container["name"]
    image = next(each["image"] for kind in _STATUSES for each in spec.get(kind, []) if each["name"] == name)
    waiting = container.get("state", {}).get("waiting", {})
    reason, said = waiting.get("reason", ""), _one_line(waiting.get("message", ""))
    if reason in _IMAGE:
        why = _REPEATED_NAME.sub("", _pull_failure(said, events))
        # ErrImagePull is the first try; the back-off means that it failed again.
        refused = reason != "ErrImagePull" and _REFUSED_IMAGE.search(why) is not None
        final = refused or reason in {"InvalidImageName", "ErrImageNeverPull"}
        return Trouble(reason, f"image {image}: {why}" if why else f"image {image}", final=final)
    if reason in _CONFIG:
        return Trouble(
            reason, f"container {name}: {said}", final=reason == "CreateContainerConfigError", container=name
        )
    ended = container.get("state", {}).get("terminated", {})
    if ended.get("exitCode", 0) != 0:
        return _trouble_of_end(name, ended, restarts=0, final=spec.get("restartPolicy") == "Never")
    ended = container.get("lastState", {}).get("terminated", {})
    if reason == "CrashLoopBackOff":
        restarts = container.get("restartCount", 0)
        return _trouble_of_end(name, ended, restarts=restarts, final=restarts >= _CRASHES_THAT_TELL)
    return None


def _trouble_of_end(name: str, ended: Resource, *, restarts: int, final: bool) -> Trouble:
    reason = ended.get("reason", "Error")
    code = ended.get("exitCode")
    how = f"container {name} ended with exit code {code}"
    if restarts:
        how += f" and was restarted {restarts} times"
    if reason == "OOMKilled":
        how += "; it needs more memory than its limit"
    if message := _one_line(ended.get("message", "")):
        how += f": {message}"
    crash_loop = restarts and reason in {"Error", "Completed"}
    return Trouble("CrashLoopBackOff" if crash_loop else reason, how, final=final, container=name)


def _trouble_of_pending(status: Resource, events: Sequence[Resource]) -> Trouble | None:
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            if condition.get("reason") == "SchedulingGated":  # a queue holds it back on purpose
                return None
            return Trouble(
                condition.get("reason", "Unschedulable"), _one_line(condition.get("message", "")), final=False
            )
    warnings = [event for event in events if event.get("type") == "Warning"]
    if warnings and warnings[-1].get("reason") in _VOLUMES_AND_SANDBOX:
        return Trouble(warnings[-1]["reason"], _one_line(warnings[-1].get("message", "")), final=False)
    return None


def _pull_failure(said: str, events: Sequence[Resource]) -> str:
    """The registry's words. Before Kubernetes 1.32 a back-off does not repeat them, and only an event has them."""
    if "Back-off" not in said or "Err" in said:
        return said.partition("ErrImagePull: ")[2] or said
    failures = [_one_line(event.get("message", "")) for event in events if event.get("reason") == "Failed"]
    pulls = [failure for failure in failures if failure.startswith("Failed to pull image")]
    return pulls[-1] if pulls else said


def _one_line(text: str) -> str:
    return " ".join(text.split())
