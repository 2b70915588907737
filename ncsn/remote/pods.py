"""The pods of a RayJob: the driver's log, and why a pod does not run."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import urllib3

from ncsn.errors import UserError
from ncsn.remote.backend import say
from ncsn.remote.driver_log import DriverLog, first_error
from ncsn.remote.kubernetes import KubernetesApi, Resource, time_of_event
from ncsn.remote.manifest import ATTEMPT_LABEL

_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
# An unreachable or busy registry may answer later; one that knows the image's name and refuses will refuse again.
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
    """What keeps a pod from running, or ended it."""

    reason: str  # Kubernetes' word: ImagePullBackOff, CrashLoopBackOff, Unschedulable, OOMKilled, Evicted, ...
    message: str  # one line: the image's name, the exit code, the scheduler's message
    final: bool  # waiting does not help
    container: str = ""  # its log may say more; empty if none has started

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def trouble_of(pod: Resource, events: Sequence[Resource]) -> Trouble | None:
    """What is wrong with a pod, by its status and its events, oldest first; None if it starts, runs or succeeded."""
    status = pod.get("status", {})
    if status.get("phase") == "Failed" and status.get("reason"):
        return Trouble(status["reason"], _message(status), final=True)
    for container in (each for kind in _STATUSES.values() for each in status.get(kind, [])):
        if trouble := _trouble_of_container(container, pod["spec"], events):
            return trouble
    return _trouble_of_pending(status, events) if status.get("phase", "Pending") == "Pending" else None


def trouble_of_owner(events: Sequence[Resource]) -> Trouble | None:
    """Why an owner of pods (a Job, a RayCluster) gets none, by events, oldest first; None if the last was created."""
    for event in reversed(events):
        if _CREATED_POD.match(event.get("reason", "")):
            return None
        if _REFUSED_POD.match(event.get("reason", "")):
            message = _message(event)
            passing = _PASSING_REFUSAL.search(message) and not _UNUSED_QUOTA.search(message)
            return Trouble(event["reason"], message, final=not passing)
    return None


def _trouble_of_container(container: Resource, spec: Resource, events: Sequence[Resource]) -> Trouble | None:
    name = container["name"]
    image = next(each["image"] for kind in _STATUSES for each in spec.get(kind, []) if each["name"] == name)
    waiting = container.get("state", {}).get("waiting", {})
    reason, said = waiting.get("reason", ""), _message(waiting)
    if reason in _IMAGE:
        why = _REPEATED_NAME.sub("", _pull_failure(said, events))
        # ErrImagePull is the first try; the back-off means that it failed again.
        refused = reason != "ErrImagePull" and _REFUSED_IMAGE.search(why) is not None
        final = refused or reason in {"InvalidImageName", "ErrImageNeverPull"}
        return Trouble(reason, f"image {image}: {why}" if why else f"image {image}", final=final)
    if reason in _CONFIG:
        final = reason == "CreateContainerConfigError"
        return Trouble(reason, f"container {name}: {said}", final=final, container=name)
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
    how = f"container {name} ended with exit code {ended.get('exitCode')}"
    if restarts:
        how += f" and was restarted {restarts} times"
    if reason == "OOMKilled":
        how += "; it needs more memory than its limit"
    if message := _message(ended):
        how += f": {message}"
    crash_loop = restarts and reason in {"Error", "Completed"}
    return Trouble("CrashLoopBackOff" if crash_loop else reason, how, final=final, container=name)


def _trouble_of_pending(status: Resource, events: Sequence[Resource]) -> Trouble | None:
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            if condition.get("reason") == "SchedulingGated":  # a queue holds it back on purpose
                return None
            return Trouble(condition.get("reason", "Unschedulable"), _message(condition), final=False)
    warnings = [event for event in events if event.get("type") == "Warning"]
    if warnings and warnings[-1].get("reason") in _VOLUMES_AND_SANDBOX:
        return Trouble(warnings[-1]["reason"], _message(warnings[-1]), final=False)
    return None


def _pull_failure(said: str, events: Sequence[Resource]) -> str:
    """The registry's message. Before Kubernetes 1.32 a back-off does not repeat it, and only an event has it."""
    if "Back-off" not in said or "Err" in said:
        return said.partition("ErrImagePull: ")[2] or said
    failures = [_message(event) for event in reversed(events) if event.get("reason") == "Failed"]
    return next((failure for failure in failures if failure.startswith("Failed to pull image")), said)


def _message(said: Resource) -> str:
    """The message of an event, a status or a state, in one line."""
    return " ".join(said.get("message", "").split())


# Trouble that waiting does not cure must last for this long: a Secret, say, may come a moment after its pod.
CONFIRM_SECONDS = 20.0

_LAST_LINES = 10
_SECONDS = len("2026-01-01T00:00:00")  # some times have fractions of a second, some have not
_MOST_EVENTS = 5  # pods per look whose events are read: many workers wait for the same reason
_GROUP_LABEL, _SUBMITTER_LABEL = "ray.io/group", "job-name"


class PodWatch:
    """Prints once why the pods of a RayJob do not run. `labels` selects them; `cause` is the latest reason."""

    def __init__(self, api: KubernetesApi, labels: str) -> None:
        self._api, self._labels = api, labels
        self._said: set[tuple[str, str]] = set()
        self._hopeless_since: dict[str, float] = {}
        self.cause: str | None = None

    def look(self, rayjob: Resource) -> str | None:
        """Print what is new and set `cause`; the cause if waiting does not help, else None."""
        try:
            pods = self._api.pods(self._labels)
            troubles = dict(self._troubles(pods, rayjob))
        except (ConnectionError, PermissionError) as error:
            self._say_once("", type(error).__name__, f"cannot read the pods: {error}")
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
            events = [each for each in self._events(owner) if time_of_event(each)[:_SECONDS] >= made] if owner else []
            if trouble := trouble_of_owner(events):
                yield owner, ({}, trouble)

    def _events(self, name: str) -> list[Resource]:
        with suppress(PermissionError):  # an older Role lacks this verb
            return self._api.events(name)
        return []

    def _tell(self, name: str, pod: Resource, trouble: Trouble) -> str:
        """Print the trouble with the container's last lines; the cause with its error."""
        cause, words = f"{name}: {trouble}", list[str]()
        if trouble.container:
            with suppress(PermissionError):
                words = self._api.last_words(name, trouble.container, lines=_LAST_LINES)
        # The kubelet alternates between these two for one cause.
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
    """The owner of a pod in phase Failed replaces it, perhaps on a better node."""
    return trouble.final and pod.get("status", {}).get("phase") != "Failed"


def _is_finished_submitter(pod: Resource) -> bool:
    """Its log is shown, and Kubernetes creates another."""
    return _SUBMITTER_LABEL in pod["metadata"]["labels"] and pod["status"].get("phase") != "Pending"


_OVERLAP_SECONDS = 10


class PodLog(DriverLog):
    """The log of a RayJob's submitter pods.

    The API server may cut the stream, and a new cluster means a new pod. Lines that were shown are dropped by their
    time. Pods of an earlier RayJob of the same name may still be ending; they have another `attempt` label.
    """

    def __init__(self, api: KubernetesApi, job: str, *, attempt: str, uri: str) -> None:
        super().__init__(uri)
        self._api, self._labels = api, f"job-name={job},{ATTEMPT_LABEL}={attempt}"
        self._pod, self._begins = "", 0
        self._last_time, self._last_read = b"", time.monotonic()

    def first_error(self) -> str | None:
        """What failed in the latest pod; if its log does not say, in those before."""
        latest = itertools.islice(self.lines(), self._begins, None)
        return first_error(latest) or first_error(self.lines())

    def follow(self) -> bool:
        """Take what is new of the latest pod's log."""
        try:
            pods = [pod for pod in self._api.pods(self._labels) if "deletionTimestamp" not in pod["metadata"]]
            if not pods:
                return False
            if (name := pods[-1]["metadata"]["name"]) != self._pod:
                self._pod, self._begins, self._last_time = name, sum(1 for _ in self.lines()), b""
            before, silent = self._last_time, time.monotonic() - self._last_read
            self._read(name, since_seconds=round(silent) + _OVERLAP_SECONDS if before else None)
        except (UserError, urllib3.exceptions.HTTPError) as error:  # not started yet, or cut
            raise ConnectionError(str(error)) from error
        return self._last_time != before

    def _read(self, pod: str, *, since_seconds: int | None) -> None:
        rest = b""
        with self._api.follow_log(pod, since_seconds=since_seconds) as pieces:
            for piece in pieces:
                *complete, rest = (rest + piece).split(b"\n")
                for line in complete:
                    self._take_new(line)

    def _take_new(self, line: bytes) -> None:
        at, _, text = line.partition(b" ")
        if at > self._last_time:
            self._last_time, self._last_read = at, time.monotonic()
            self.take(text)
