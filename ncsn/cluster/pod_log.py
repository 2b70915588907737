"""The log of a RayJob's driver, followed from the submitter's pod."""

from __future__ import annotations

import itertools
import time

import urllib3

from ncsn.cluster.api import KubernetesApi
from ncsn.cluster.driver_log import DriverLog, first_error
from ncsn.cluster.rayjob_manifest import ATTEMPT_LABEL

_OVERLAP_SECONDS = 10


class PodLog(DriverLog):
    """A context; see `DriverLog`.

    The API server may cut the stream, and a new cluster means a new pod. What was shown is dropped by the time of each
    line. Pods of an earlier RayJob of the same name may still be ending: theirs is not this log.

    Args:
        api: The cluster.
        job: Name of the RayJob.
        attempt: What labels its pods.
        uri: Where the whole log is kept in the end.
    """

    def __init__(self, api: KubernetesApi, job: str, *, attempt: str, uri: str) -> None:
        super().__init__(uri)
        self._api, self._labels = api, f"job-name={job},{ATTEMPT_LABEL}={attempt}"
        self._pod, self._begins = "", 0
        self._last_time, self._last_read = b"", time.monotonic()

    def first_error(self) -> str | None:
        """What failed in the latest pod; where that has nothing to say, in those before."""
        latest = itertools.islice(self.lines(), self._begins, None)
        return first_error(latest) or first_error(self.lines())

    def follow(self) -> bool:
        """Take what is new of the latest pod's log; see `DriverLog.follow`."""
        try:
            pods = [pod for pod in self._api.pods(self._labels) if "deletionTimestamp" not in pod["metadata"]]
            if not pods:
                return False
            if (name := pods[-1]["metadata"]["name"]) != self._pod:
                self._pod, self._begins, self._last_time = name, sum(1 for _ in self.lines()), b""
            before, silent = self._last_time, time.monotonic() - self._last_read
            self._read(name, since_seconds=round(silent) + _OVERLAP_SECONDS if before else None)
        except (ValueError, urllib3.exceptions.HTTPError) as error:  # not started yet, or cut
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
