"""Steps as jobs on a Ray cluster that is there already: submit or attach to one, watch it to its end, show its log."""

from __future__ import annotations

import asyncio
import re
import shlex
import time
from collections.abc import Callable
from contextlib import suppress

from ncsn import storage
from ncsn.config.compute import ComputeConfig
from ncsn.errors import UserError
from ncsn.process import PYTHON, python_version
from ncsn.remote.backend import (
    Conflict,
    DriverLog,
    RemoteFailure,
    RemoteLost,
    RemoteStep,
    command_digest,
    ended_on_sigterm,
    first_error,
    job_name,
    say,
)
from ncsn.remote.jobs_api import JobDetails, JobsApi, JobStatus, NoSuchJob
from ncsn.remote.manifest import forwarded_environment
from ncsn.storage.heartbeat import RENEW_SECONDS, Heartbeat

RUN, STEP, REQUEST = "ncsn.run", "ncsn.step", "ncsn.request"
"""Keys in the metadata of a job."""

NOT_FOUND = 127
"""A shell's exit code for a command that is not there."""

STOP_SECONDS = 30
"""For a driver that is told to stop: it records that in the store and in MLflow."""

_POLL_SECONDS = (0.5, 2.0)
_SILENT_SECONDS = 300.0
_STOP_WAIT_SECONDS = 10.0


class RayJobs:
    """The backend `ray-jobs`.

    Args:
        compute: Names the cluster.
        api: The cluster; the one that the settings or the environment name by default.
        renew_seconds: How often the lease is renewed.
    """

    def __init__(
        self, compute: ComputeConfig, *, api: JobsApi | None = None, renew_seconds: float = RENEW_SECONDS
    ) -> None:
        self._api = api or JobsApi(compute.ray_jobs.address)
        # Neither the log nor a process that is being killed waits for a head node that is away.
        self._impatient = JobsApi(self._api.address, patience=0)
        self._renew_seconds = renew_seconds

    def execute(self, step: RemoteStep) -> None:
        """Run the step as a job, or attach to the one that an earlier attempt left at work; return when it is done.

        SIGTERM and Ctrl-C stop the job. If this process is killed or cut off, the job ends when the lease is stale,
        unless the same command is given again before.

        Raises:
            RemoteFailure: if it ended without success, with the reason in one line.
            PermissionError: if the token is missing or wrong.
            ConnectionError: if the cluster has not answered for long.
            UserError: if the step runs there on other inputs.
        """
        lease = storage.join(step.uri, "lease.json")
        beat = Heartbeat(lease, also=lambda: None, every=self._renew_seconds)
        running: list[str] = []
        with beat, ended_on_sigterm(lambda: self._stop(running)):
            try:
                name = self._submit_or_adopt(step, lease, running.append)
                with JobLog(self._impatient, name, uri=storage.join(step.uri, "driver.log")) as log:
                    job = self._watch(name)
                    log.finish()
                    _require_success(job, name, log)
            except (KeyboardInterrupt, SystemExit):
                self._stop(running)
                self._wait_for_end(running)
                raise

    def stop_all(self, run: str) -> list[str]:
        """Stop the jobs of a run that are at work; their names."""
        found = [job for job in self._api.jobs() if (job.metadata or {}).get(RUN) == run and not _ended(job)]
        names = [str(job.submission_id) for job in found]
        for name in names:
            self._api.stop(name)
        return names

    def _submit_or_adopt(self, step: RemoteStep, lease: str, announce: Callable[[str], None]) -> str:
        """The name of the job, which is announced before it may be at work.

        Ray never takes a name twice, so each attempt has a number. Two launchers that try at once choose the same one:
        the second is refused, looks again, and attaches to the job of the first.
        """
        base, digest = job_name(step.run, step.step, step.uri), command_digest(step.command)
        while True:
            number, latest = self._latest(base)
            if latest is not None and not _ended(latest):
                return self._adopt(latest, digest, announce)
            name = base if number == 0 else f"{base}-{number + 1}"
            announce(name)
            try:
                self._api.submit(
                    name,
                    entrypoint=shlex.join((*step.command, "--lease", lease)),
                    metadata={"job_name": base, RUN: step.run, STEP: step.step, REQUEST: digest}
                    | {PYTHON: python_version(), **step.facts},
                    env={**forwarded_environment(), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                )
            except Conflict:
                continue
            say(f"Ray job {name} submitted to {self._api.address}")
            return name

    def _adopt(self, job: JobDetails, digest: str, announce: Callable[[str], None]) -> str:
        name = str(job.submission_id)
        if (job.metadata or {}).get(REQUEST) != digest:
            raise UserError(
                name,
                "this Ray job runs the same step on other inputs",
                hint=f"wait for it, or stop it: ray job stop {name} --address {self._api.address}",
            )
        announce(name)
        say(f"attached to Ray job {name}, which is {job.status}")
        return name

    def _latest(self, base: str) -> tuple[int, JobDetails | None]:
        """The number of the last attempt, 0 = none, and its job."""
        attempt = re.compile(rf"{re.escape(base)}(?:-(\d+))?")
        jobs = {
            int(match[1] or 1): job
            for job in self._api.jobs()
            if (match := attempt.fullmatch(str(job.submission_id))) is not None
        }
        number = max(jobs, default=0)
        return number, jobs.get(number)

    def _watch(self, name: str) -> JobDetails:
        shown, pause = "", _POLL_SECONDS[0]
        while True:
            try:
                job = self._api.job(name)
            except NoSuchJob:
                raise RemoteLost(f"the cluster no longer knows Ray job {name}: its head was started anew") from None
            if str(job.status) != shown:
                shown = str(job.status)
                say(f"Ray job {name}: {shown}")
            if _ended(job):
                return job
            time.sleep(pause)
            pause = min(1.2 * pause, _POLL_SECONDS[1])

    def _stop(self, names: list[str]) -> None:
        for name in names[-1:]:
            try:
                self._impatient.stop(name)
            except (ConnectionError, RuntimeError) as error:
                say(f"Ray job {name} could not be stopped ({error}); its driver ends when the lease is stale")

    def _wait_for_end(self, names: list[str]) -> None:
        """So that the same command, given again at once, does not attach to a job that is ending."""
        ends = time.monotonic() + _STOP_WAIT_SECONDS
        with suppress(ConnectionError, RuntimeError, NoSuchJob):
            while names and time.monotonic() < ends and not _ended(self._impatient.job(names[-1])):
                time.sleep(_POLL_SECONDS[0])


class JobLog(DriverLog):
    """A context; see `DriverLog`. After a broken connection the log comes anew, and what was shown is skipped.

    Args:
        api: The cluster, without patience.
        name: The job.
        uri: Where the whole log is kept in the end.
    """

    def __init__(self, api: JobsApi, name: str, *, uri: str) -> None:
        super().__init__(uri)
        self._api, self._name = api, name
        self._taken, self._rest = 0, ""

    def follow(self) -> bool:
        """Take what is new until the job ends or the connection breaks; see `DriverLog.follow`."""
        before = self._taken
        try:
            asyncio.run(self._tail())
        except TimeoutError as error:
            raise ConnectionError("silent for long") from error
        return self._taken != before

    def finish(self) -> None:
        """Read what is left, a last line without its end too, and publish all of it."""
        self.stop_following()
        if self._rest:
            self.take(self._rest.encode())
        self.publish()

    async def _tail(self) -> None:
        place, pieces = 0, self._api.tail(self._name)
        while True:
            try:
                piece = await asyncio.wait_for(anext(pieces), _SILENT_SECONDS)
            except StopAsyncIteration:
                return
            new = piece[max(0, self._taken - place) :]
            place += len(piece)
            self._taken = max(self._taken, place)
            *complete, self._rest = (self._rest + new).split("\n")
            for line in complete:
                self.take(line.encode())


def _ended(job: JobDetails) -> bool:
    return JobStatus(job.status).is_terminal()


def _require_success(job: JobDetails, name: str, log: JobLog) -> None:
    """The exit code of the driver is what counts; Ray derives the job's status from it."""
    if job.status == JobStatus.SUCCEEDED:
        return
    if job.status == JobStatus.STOPPED:
        raise RemoteFailure(f"Ray job {name} was stopped; the same command goes on; log {log.uri}")
    code = job.driver_exit_code
    if code == NOT_FOUND:
        raise RemoteFailure(
            f"Ray job {name} failed: the cluster has no command `ncsn`; install this package in the environment that "
            f"`ray start` runs in, and put its bin folder on that PATH; log {log.uri}"
        )
    how = "no exit code" if code is None else f"exit code {code}"
    cause = first_error(log.lines()) or " ".join(str(job.message).split())
    raise RemoteFailure(f"Ray job {name} failed ({how}): {cause}; log {log.uri}")
