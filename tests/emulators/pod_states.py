"""States of a pod that does not start, as Kubernetes 1.34.4 writes them, with the events that come along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Resource = dict[str, Any]
State = Callable[[Resource], tuple[Resource, list[Resource]]]  # from a pod's spec to its status and its events


def running(spec: Resource) -> tuple[Resource, list[Resource]]:
    """All containers run."""
    statuses = [_container(each, {"running": {}}) | {"ready": True} for each in spec["containers"]]
    return {"phase": "Running", "containerStatuses": statuses}, []


def unpullable(spec: Resource) -> tuple[Resource, list[Resource]]:
    """The registry does not have the image."""
    image = spec["containers"][0]["image"]
    why = (
        f'failed to pull and unpack image "{image}": failed to resolve reference "{image}": pull access denied, '
        "repository does not exist or may require authorization: server message: insufficient_scope"
    )
    waiting = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{image}": ErrImagePull: {why}'}
    events = [_warning("Failed", f'Failed to pull image "{image}": {why}'), _warning("Failed", "Error: ErrImagePull")]
    return _pending(spec, waiting), events


def unschedulable(_spec: Resource) -> tuple[Resource, list[Resource]]:
    """No node has room."""
    words = "0/1 nodes are available: 1 Insufficient memory. no new claims to deallocate"
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    return {"phase": "Pending", "conditions": [condition]}, [_warning("FailedScheduling", words)]


def crash_loop(spec: Resource) -> tuple[Resource, list[Resource]]:
    """The container ends again and again."""
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container"}
    (container,) = spec["containers"]
    ended = {"lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}, "restartCount": 3}
    return {"phase": "Running", "containerStatuses": [_container(container, {"waiting": waiting}) | ended]}, []


def _pending(spec: Resource, waiting: Resource) -> Resource:
    return {"phase": "Pending", "containerStatuses": [_container(e, {"waiting": waiting}) for e in spec["containers"]]}


def _container(container: Resource, state: Resource) -> Resource:
    return {"name": container["name"], "image": container["image"], "state": state, "restartCount": 0, "ready": False}


def _warning(reason: str, message: str) -> Resource:
    return {"type": "Warning", "reason": reason, "message": message}
