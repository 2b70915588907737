"""Pods: why one does not run, those of a RayJob while it is watched, its driver's log, and those of a pipeline run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ncsn.environment import RUN_ID_LABEL
from ncsn.progress import say
from ncsn.remote.backend import TRACEBACK, DriverLog, first_error
from ncsn.remote.kubernetes import KubernetesApi, Resource, time_of_event
from ncsn.remote.manifest import ATTEMPT_LABEL

# Trouble that waiting does not cure must last for this long: a Secret, say, may come a moment after its pod.
CONFIRM_SECONDS = 20.0

_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
# An unreachable or busy registry may answer later; one that knows the image's name and refuses will refuse again.
_REFUSED_IMAGE = re.compile(
    r"not found|no such host|manifest unknown|denied|unauthorized|authorization failed|invalid reference", re.IGNORECASE
)
_CRASHES_THAT_TELL = 3
_VOLUMES_AND_SANDBOX = {"FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"}
_REFUSED_POD = re.compile(r"^Failed(Create$|ToCreate(Head|Worker)Pod$)")
_CREATED_POD = re.compile(r"^(SuccessfulCreate|Created(Head|Worker)Pod)$")
_LAST_LINES = 10
_SECONDS = len("2026-01-01T00:00:00")  # some times have fractions of a second, some have not
_MOST_EVENTS = 5  # pods per look whose events are read: many workers wait for the same reason
# The submitter's own lines when the head is lost, of which `PodWatch` has one. The driver's tracebacks stay.
_LOST_CONNECTION = re.compile(
    rf"^({re.escape(TRACEBACK)}:\n( .*\n)*)?"
    r".*WebSocket (closed for job \S+ with close code 1006|connection closed|error for job).*\n",
    re.MULTILINE,
)
_NODE_SUFFIX = re.compile(r"\(\d+\)$")


@dataclass(frozen=True)
class Trouble:
    """What keeps a pod from running, or ended it."""

    reason: str  # Kubernetes' word: ImagePullBackOff, CrashLoopBackOff, Unschedulable, OOMKilled, Evicted, ...
    message: str  # one line: the image's name, the exit code, the scheduler's message
    final: bool = False  # waiting does not help
    container: str = ""  # its log may say more; empty if none has started

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def trouble_of(pod: Resource, events: Sequence[Resource]) -> Trouble | None:
    """What is wrong with a pod, by its status and its events, oldest first; None if it starts, runs or succeeded."""
    status, phase = pod.get("status", {}), pod.get("status", {}).get("phase", "Pending")
    if phase == "Failed" and status.get("reason"):
        return Trouble(status["reason"], _message(status))
    for container in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        if trouble := _trouble_of_container(container):
            return trouble
    if phase != "Pending":
        return None
    for condition in status.get("conditions", []):
        if (condition["type"], condition["status"]) == ("PodScheduled", "False"):
            reason = condition.get("reason", "Unschedulable")
            # With a gate, a queue holds it back on purpose.
            return Trouble(reason, _message(condition)) if reason != "SchedulingGated" else None
    last = next((event for event in reversed(events) if event.get("type") == "Warning"), {})
    return Trouble(last["reason"], _message(last)) if last.get("reason") in _VOLUMES_AND_SANDBOX else None


def end_of(pod: Resource) -> Trouble | None:
    """How a container of the pod ended that runs again; None if none did, or by itself."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        ended = container.get("lastState", {})
        if "running" in container.get("state", {}) and ended.get("terminated", {}).get("exitCode"):
            return _trouble_of_container({**container, "state": ended})
    return None


def _runs(pod: Resource) -> bool:
    statuses = pod["status"].get("containerStatuses", [])
    return bool(statuses) and all("running" in status.get("state", {}) for status in statuses)


def _life(pod: Resource) -> list[object]:
    """Another one for another pod, and when a container starts again."""
    restarts = (status.get("restartCount", 0) for status in pod["status"].get("containerStatuses", []))
    return [pod["metadata"].get("uid"), *restarts]


def trouble_of_owner(events: Sequence[Resource]) -> Trouble | None:
    """Why an owner of pods (a Job, a RayCluster) gets none, by events, oldest first; None if the last was created."""
    for event in reversed(events):
        if _CREATED_POD.match(event.get("reason", "")):
            return None
        if _REFUSED_POD.match(event.get("reason", "")):
            message = _message(event)
            return Trouble(event["reason"], message, final="forbidden" in message and "exceeded quota" not in message)
    return None


def _trouble_of_container(container: Resource) -> Trouble | None:
    name, restarts, state = container["name"], container.get("restartCount", 0), container.get("state", {})
    waiting, ended = state.get("waiting", {}), state.get("terminated", {})
    reason, said = waiting.get("reason", ""), _message(waiting)
    if reason in _IMAGE:
        # ErrImagePull is the first try; the back-off means that it failed again.
        refused = reason != "ErrImagePull" and _REFUSED_IMAGE.search(said) is not None
        final = refused or reason in {"InvalidImageName", "ErrImageNeverPull"}
        return Trouble(reason, f"image {container['image']}: {said}", final=final)
    if reason in _CONFIG:
        final = reason == "CreateContainerConfigError"
        return Trouble(reason, f"container {name}: {said}", final=final, container=name)
    crash_loop = reason == "CrashLoopBackOff"
    if crash_loop:
        ended = container.get("lastState", {}).get("terminated", {})
    elif ended.get("exitCode", 0) == 0:
        return None
    if not crash_loop or ended.get("reason", "Error") not in {"Error", "Completed"}:
        reason = ended.get("reason", "Error")
    how = f"container {name} ended with exit code {ended.get('exitCode')}"
    how += f" and was restarted {restarts} times" if crash_loop else ""
    how += "; it needs more memory than its limit" if reason == "OOMKilled" else ""
    how += f": {_message(ended)}" if _message(ended) else ""
    return Trouble(reason, how, final=crash_loop and restarts >= _CRASHES_THAT_TELL, container=name)


def _message(said: Resource) -> str:
    """The message of an event, a status or a state, in one line."""
    return " ".join(said.get("message", "").split())


class PodWatch:
    """Prints once why the pods of a RayJob do not run, and each loss of the head, with what `resumes` says.

    `labels` selects the pods; `cause` is the latest reason, `ended` why a container ended that runs again, `submitter`
    the name of the newest pod that has the driver's log.
    """

    def __init__(self, api: KubernetesApi, labels: str, *, resumes: Callable[[], str] = lambda: "") -> None:
        self._api, self._labels, self._resumes = api, labels, resumes
        self._said: set[str] = set()
        self._hopeless_since: dict[str, float] = {}
        self._head: Resource | None = None  # the pod, as it was seen running
        self.cause: str | None = None
        self.ended: str | None = None
        self.submitter = ""

    def look(self, rayjob: Resource) -> str | None:
        """Print what is new and set `cause`; the cause if waiting does not help, else None."""
        try:
            pods = self._api.find("pods", labels=self._labels)
            for pod in pods:
                if "job-name" in pod["metadata"]["labels"]:
                    self.submitter = pod["metadata"]["name"]
                if ended := end_of(pod):
                    self.ended = f"{pod['metadata']['name']}: {ended}"
                    self._say_once(f"{ended.reason} {ended.container}", self.ended)
            self._look_at_head(pods, rayjob)
            causes = {name: (trouble, self._tell(name, trouble)) for name, trouble in self._troubles(pods, rayjob)}
        except (ConnectionError, PermissionError) as error:
            self._say_once(type(error).__name__, f"cannot read the pods: {error}")
            return None
        if pods or causes:  # pods that are gone were deleted for what they waited for
            self.cause = next((cause for _, cause in causes.values()), None)  # the head's: other pods wait for it
        now, before = time.monotonic(), self._hopeless_since
        # The kubelet alternates between a final and another trouble for one cause.
        still = [name for name, (trouble, _) in causes.items() if trouble.final or name in before]
        self._hopeless_since = {name: before.get(name, now) for name in still}
        confirmed = [name for name, since in self._hopeless_since.items() if now - since >= CONFIRM_SECONDS]
        return next((causes[name][1] for name in confirmed if causes[name][0].final), None)

    def _look_at_head(self, pods: list[Resource], rayjob: Resource) -> None:
        """Say once if the head is lost, and with it the driver, unless the operator deletes or replaces the cluster."""
        status, stays = rayjob.get("status", {}), "deletionTimestamp" not in rayjob["metadata"]
        cluster = status.get("rayClusterName") if stays and status.get("jobDeploymentStatus") == "Running" else None
        labels = {"ray.io/node-type": "head", "ray.io/cluster": cluster}
        heads = [pod for pod in pods if labels.items() <= pod["metadata"]["labels"].items()]
        now = next((pod for pod in heads if "deletionTimestamp" not in pod["metadata"] and _runs(pod)), None)
        before, self._head = self._head, now
        if not (cluster and before and before["metadata"]["labels"]["ray.io/cluster"] == cluster):
            return
        if now is None or _life(now) != _life(before):
            name = before["metadata"]["name"]
            left = next((pod for pod in heads if pod["metadata"]["name"] == name), {})
            why = (trouble_of(left, []) or end_of(left)) if left else None
            say(f"the head is lost, and with it the driver ({name}: {why or 'the pod is gone'}); {self._resumes()}")

    def _troubles(self, pods: list[Resource], rayjob: Resource) -> Iterator[tuple[str, Trouble]]:
        budget = _MOST_EVENTS
        for pod in pods:
            name, waits = pod["metadata"]["name"], pod["status"].get("phase") == "Pending"
            over = "job-name" in pod["metadata"]["labels"] and not waits  # a submitter, whose log is shown
            if over or "deletionTimestamp" in pod["metadata"]:
                continue
            events = self._api.events(name) if waits and budget > 0 else []
            budget -= waits
            if trouble := trouble_of(pod, events):
                yield name, trouble
        made = rayjob["metadata"].get("creationTimestamp", "")[:_SECONDS]
        for owner in (rayjob["metadata"]["name"], rayjob.get("status", {}).get("rayClusterName")):
            # Events outlive what they are about: an earlier RayJob of this name may have left some.
            events = self._api.events(owner) if owner else []
            if trouble := trouble_of_owner([each for each in events if time_of_event(each)[:_SECONDS] >= made]):
                yield owner, trouble

    def _tell(self, name: str, trouble: Trouble) -> str:
        """Print the trouble with the container's last lines; the cause with its error."""
        cause, container = f"{name}: {trouble}", trouble.container
        words = self._api.read_log(name, container=container, tailLines=str(_LAST_LINES)) if container else []
        # Said once: the kubelet alternates between these two for one cause.
        self._say_once(trouble.reason.replace("ErrImagePull", "ImagePullBackOff"), "\n  | ".join([cause, *words]))
        said = first_error(words) or next((line.strip() for line in reversed(words) if line.strip()), None)
        return f"{cause}: {said}" if said else cause

    def _say_once(self, reason: str, line: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            say(line)


class PodLog(DriverLog):
    """The log of a RayJob's submitter pods: a new cluster means a new pod.

    Pods of an earlier RayJob of the same name may still be ending; they have another `attempt` label.
    """

    def __init__(self, api: KubernetesApi, job: str, pods: PodWatch, *, attempt: str, uri: str) -> None:
        super().__init__(uri)
        self._api, self._pods, self._labels = api, pods, f"job-name={job},{ATTEMPT_LABEL}={attempt}"
        self._pod, self._begins, self._last_time = "", 0, ""

    def first_error(self) -> str | None:
        """What failed in the latest pod; if its log does not say, in those before."""
        return first_error(self.lines[self._begins :]) or first_error(self.lines)

    def read(self, *, over: bool) -> list[str]:
        found = self._api.find("pods", labels=self._labels) if over else []  # one that the watch may not have seen
        newest = found[-1]["metadata"]["name"] if found else self._pods.submitter
        if newest != self._pod:
            self._pod, self._begins, self._last_time = newest, len(self.lines), ""
        lines = []
        for line in self._api.read_log(newest, timestamps="true", sinceTime=self._last_time) if newest else ():
            at, _, text = line.partition(" ")
            if at > self._last_time:  # the others are of the same second
                self._last_time = at
                lines.append(f"{text}\n")
        return _LOST_CONNECTION.sub("", "".join(lines)).split("\n")[:-1]


def troubles_of_run(api: KubernetesApi, run_id: str, *, pending: bool = False) -> Mapping[str, Trouble]:
    """Task of KFP's run -> what keeps its last pod from running, or ended it; `pending`: only what has not started."""
    pods = {}
    for pod in api.find("pods", labels=f"{RUN_ID_LABEL}={run_id}"):
        node = (pod["metadata"].get("annotations") or {}).get("workflows.argoproj.io/node-name", "")
        *path, last = [_NODE_SUFFIX.sub("", part) for part in node.split(".")]
        if path and last == "executor":  # and no driver of KFP; the path ends with the pipeline's name of the task
            pods[path[-1]] = pod
    asked = {task: pod for task, pod in pods.items() if not pending or pod["status"].get("phase") == "Pending"}
    found = ((task, trouble_of(pod, api.events(pod["metadata"]["name"]))) for task, pod in asked.items())
    return {task: trouble for task, trouble in found if trouble is not None}
