"""The log of a RayJob's driver, followed from the submitter's pod."""

from __future__ import annotations

import time

import urllib3

from ncsn.cluster.api import KubernetesApi
from ncsn.cluster.driver_log import DriverLog

_OVERLAP_SECONDS = 10


class PodLog(DriverLog):
    """A context; see `DriverLog`.

    The API server may cut the stream, and a new cluster means a new pod. What was shown is dropped by the time of each
    line.

    Args:
        api: The cluster.
        job: Name of the RayJob.
        uri: Where the whole log is kept in the end.
    """

    def __init__(self, api: KubernetesApi, job: str, *, uri: str) -> None:
        super().__init__(uri)
        self._api, self._job = api, job
        self._last_time, self._last_read = b"", time.monotonic()

    def follow(self) -> bool:
        """Take what is new of the latest pod's log; see `DriverLog.follow`."""
        before = self._last_time
        silent = time.monotonic() - self._last_read
        try:
            pods = self._api.pods(f"job-name={self._job}")
            if not pods:
                return False
            self._read(pods[-1]["metadata"]["name"], since_seconds=round(silent) + _OVERLAP_SECONDS if before else None)
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
