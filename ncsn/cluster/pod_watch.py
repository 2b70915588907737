"""What the pods of a RayJob are waiting for. KubeRay's status never names it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

from ncsn.cluster.api import KubernetesApi, Resource, time_of_event
from ncsn.cluster.backend import say
from ncsn.cluster.driver_log import first_error
from ncsn.cluster.pod_trouble import Trouble, trouble_of, trouble_of_owner

CONFIRM_SECONDS = 20.0
"""For so long trouble that waiting does not cure must be seen: a Secret, say, may come a moment after its pod."""

_LAST_LINES = 10
_SECONDS = len("2026-01-01T00:00:00")  # some times have fractions of a second, some have not
_MOST_EVENTS = 5  # pods per look whose events are read: many workers wait for the same reason
_GROUP_LABEL, _SUBMITTER_LABEL = "ray.io/group", "job-name"


class PodWatch:
    """Says once why pods do not run.

    Args:
        api: The cluster.
        labels: Selector of the pods of one RayJob.
    """

    def __init__(self, api: KubernetesApi, labels: str) -> None:
        self._api, self._labels = api, labels
        self._said: set[tuple[str, str]] = set()
        self._hopeless_since: dict[str, float] = {}
        self.cause: str | None = None

    def look(self, rayjob: Resource) -> str | None:
        """Say what is new, and leave the latest cause in `cause`.

        Args:
            rayjob: The RayJob as it is now.

        Returns:
            The cause if waiting does not help; None otherwise.
        """
        try:
            pods = self._api.pods(self._labels)
            troubles = dict(self._troubles(pods, rayjob))
        except (ConnectionError, PermissionError) as error:
            self._say_once("", type(error).__name__, f"the pods cannot be looked at: {error}")
            return None
        groups = {_group(pod) for pod, _ in troubles.values()}
        self._said = {(group, reason) for group, reason in self._said if group in groups}
        now, hopeless = time.monotonic(), dict[str, float]()
        if pods or troubles:  # pods that are gone were deleted for what they waited for
            self.cause = None
        for name, (pod, trouble) in troubles.items():
            cause = self._tell(name, pod, trouble)
            self.cause = self.cause or cause  # the oldest pod, which is the head: others wait for it
            if name in self._hopeless_since or _is_hopeless(pod, trouble):
                hopeless[name] = self._hopeless_since.get(name, now)
                if _is_hopeless(pod, trouble) and now - hopeless[name] >= CONFIRM_SECONDS:
                    return cause
        self._hopeless_since = hopeless
        return None

    def _troubles(self, pods: list[Resource], rayjob: Resource) -> Iterator[tuple[str, tuple[Resource, Trouble]]]:
        budget = _MOST_EVENTS
        for pod in pods:
            if "deletionTimestamp" in pod["metadata"] or _is_finished_submitter(pod):
                continue
            name, waits = pod["metadata"]["name"], pod["status"].get("phase") == "Pending"
            events = self._events(name) if waits and budget > 0 else []
            budget -= waits
            if trouble := trouble_of(pod, events):
                yield name, (pod, trouble)
        made = rayjob["metadata"].get("creationTimestamp", "")[:_SECONDS]
        for owner in (rayjob["metadata"]["name"], rayjob.get("status", {}).get("rayClusterName")):
            # Events outlive what they are about: an earlier RayJob of this name may have left some.
            events = (
                [event for event in self._events(owner) if time_of_event(event)[:_SECONDS] >= made] if owner else []
            )
            if owner and (trouble := trouble_of_owner(events)):
                yield owner, ({}, trouble)

    def _events(self, name: str) -> list[Resource]:
        with suppress(PermissionError):  # a Role from before this was read
            return self._api.events(name)
        return []

    def _tell(self, name: str, pod: Resource, trouble: Trouble) -> str:
        cause, words = f"{name}: {trouble}", list[str]()
        if trouble.container:
            with suppress(PermissionError):
                words = self._api.last_words(name, trouble.container, lines=_LAST_LINES)
        # The kubelet changes between these two, for one cause.
        reason = trouble.reason.replace("ErrImagePull", "ImagePullBackOff")
        self._say_once(_group(pod), reason, "\n  | ".join([cause, *words]))
        said = first_error(words) or next((line.strip() for line in reversed(words) if line.strip()), None)
        return f"{cause}: {said}" if said else cause

    def _say_once(self, group: str, reason: str, line: str) -> None:
        if (group, reason) not in self._said:
            self._said.add((group, reason))
            say(line)


def _group(pod: Resource) -> str:
    return str(pod.get("metadata", {}).get("labels", {}).get(_GROUP_LABEL, ""))


def _is_hopeless(pod: Resource, trouble: Trouble) -> bool:
    """A pod that has failed for good is replaced by its owner, which may do better elsewhere."""
    return trouble.final and pod.get("status", {}).get("phase") != "Failed"


def _is_finished_submitter(pod: Resource) -> bool:
    """Its log is shown, and Kubernetes makes another."""
    return _SUBMITTER_LABEL in pod["metadata"]["labels"] and pod["status"].get("phase") != "Pending"
