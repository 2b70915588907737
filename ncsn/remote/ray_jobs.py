"""Steps as jobs on a running Ray cluster: submit a job or attach to it, watch it to its end, show its log."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property

from ncsn import storage
from ncsn.config.compute import ComputeConfig
from ncsn.process import KFP_RUN_ID, PYTHON, python_version
from ncsn.remote.backend import (
    CHECK_SECONDS,
    Check,
    Conflict,
    Found,
    RemoteFailure,
    RemoteLost,
    RemoteStep,
    attach_or_start,
    command_digest,
    ended_on_sigterm,
    job_name,
    say,
)
from ncsn.remote.driver_log import DriverLog, first_error
from ncsn.remote.jobs_api import Job, JobsApi, NoSuchJob
from ncsn.remote.launcher import forwarded_environment
from ncsn.storage.heartbeat import RENEW_SECONDS, Heartbeat

# Keys in the metadata of a job.
RUN, STEP, REQUEST, KFP_RUN = "ncsn.run", "ncsn.step", "ncsn.request", "ncsn.kfp_run"
NOT_FOUND = 127  # a shell's exit code for an unknown command
STOP_SECONDS = 30  # for a driver that is asked to stop: it records that in the store and in MLflow

_POLL_SECONDS = (0.5, 2.0)
_SILENT_SECONDS = 300.0
_STOP_WAIT_SECONDS = 10.0


class RayJobs:
    """The backend `ray-jobs`. `renew_seconds` is the period of the lease's renewal."""

    def __init__(self, compute: ComputeConfig, *, renew_seconds: float = RENEW_SECONDS) -> None:
        self._address = compute.ray_jobs.address
        self._renew_seconds = renew_seconds
        self._running: str | None = None  # the job that this process started or attached to

    @cached_property
    def _api(self) -> JobsApi:
        return JobsApi(self._address)

    @cached_property
    def _impatient(self) -> JobsApi:
        """For the log, and for a process that is being killed: neither waits for a head node that is unreachable."""
        return self._api.impatient()

    def connect(self) -> None:
        """Ask the cluster for its version."""
        _ = self._api

    def execute(self, step: RemoteStep) -> None:
        """Run the step as a job, or attach to the one that an earlier attempt left; return when it has ended.

        SIGTERM and Ctrl-C stop the job. If this process is killed or cut off, the job ends when the lease is stale,
        unless the same command is given again before.
        """
        base, request = job_name(step.run, step.step, step.uri), command_digest(step.command)
        beat = Heartbeat(step.lease, every=self._renew_seconds)
        with beat, ended_on_sigterm(self._stop_running):
            try:
                name = attach_or_start(
                    request, start=lambda: self._submit(step, base, request), find=lambda: self._find(base)
                )
                with JobLog(self._impatient, name, uri=storage.join(step.uri, "log.txt")) as log:
                    job = self._watch(name)
                    log.finish()
                    _require_success(job, log)
            except (KeyboardInterrupt, SystemExit):
                self._stop_running()
                self._wait_for_end()
                raise

    def stop(self, *, run: str | None, kfp_run: str | None) -> list[str]:
        """Stop the running jobs of a run, or of a run of KFP; their names."""
        wanted = {key: value for key, value in ((RUN, run), (KFP_RUN, kfp_run)) if value}
        if not wanted:
            return []
        names = [job.name for job in self._api.jobs() if wanted.items() <= job.metadata.items() and not job.ended]
        for name in names:
            self._api.stop(name)
        return names

    def checks(self) -> Iterator[Check]:
        """That the cluster answers, takes the token, and has the same Ray."""
        fix = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE  # and --address http://HEAD:8265"
        yield Check("ray jobs", self._describe, fix)

    def _describe(self) -> str:
        api = JobsApi(self._address, patience=CHECK_SECONDS)
        running = sum(not job.ended for job in api.jobs())
        return f"{api.address}: Ray {api.ray_version}, as here, {running} running jobs"

    def _submit(self, step: RemoteStep, base: str, request: str) -> str:
        """Start the next attempt. Ray never takes a name twice, so each attempt has a number.

        Two launchers that try at once choose the same number: Ray refuses the second, which attaches.
        """
        number, latest = self._latest(base)
        if latest is not None and not latest.ended:
            raise Conflict
        name = base if number == 0 else f"{base}-{number + 1}"
        kfp_run = os.environ.get(KFP_RUN_ID)
        self._running = name  # before it may run, because this process may be killed meanwhile
        try:
            self._api.submit(
                name,
                entrypoint=shlex.join(step.leased_command),
                metadata={"job_name": base, RUN: step.run, STEP: step.step, REQUEST: request}
                | {PYTHON: python_version(), **step.facts}
                | ({KFP_RUN: kfp_run} if kfp_run else {}),
                env={**forwarded_environment(), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
            )
        except Conflict:
            self._running = None
            raise
        say(f"Ray job {name} submitted to {self._api.address}")
        return name

    def _find(self, base: str) -> Found[str] | None:
        _, job = self._latest(base)
        if job is None:
            return None

        def attach() -> str:
            self._running = job.name
            return job.name

        return Found(
            kind="Ray job",
            name=job.name,
            state=job.status,
            request=job.metadata.get(REQUEST, ""),
            attachable=not job.ended,
            running=not job.ended,
            attach=attach,
            clear=lambda: None,  # the next attempt has another name
            how_to_end=f"ray job stop {job.name} --address {self._api.address}",
        )

    def _latest(self, base: str) -> tuple[int, Job | None]:
        """The number of the last attempt, 0 = none, and its job."""
        attempt = re.compile(rf"{re.escape(base)}(?:-(\d+))?")
        jobs = {int(match[1] or 1): job for job in self._api.jobs() if (match := attempt.fullmatch(job.name))}
        number = max(jobs, default=0)
        return number, jobs.get(number)

    def _watch(self, name: str) -> Job:
        shown, pause = "", _POLL_SECONDS[0]
        while True:
            try:
                job = self._api.job(name)
            except NoSuchJob:
                raise RemoteLost(f"the cluster no longer knows Ray job {name}: its head was restarted") from None
            if job.status != shown:
                shown = job.status
                say(f"Ray job {name}: {shown}")
            if job.ended:
                return job
            time.sleep(pause)
            pause = min(1.2 * pause, _POLL_SECONDS[1])

    def _stop_running(self) -> None:
        if self._running is None:
            return
        try:
            self._impatient.stop(self._running)
        except (OSError, RuntimeError) as error:
            say(f"Ray job {self._running} could not be stopped ({error}); its driver ends when its lease expires")

    def _wait_for_end(self) -> None:
        """Wait, so that the same command, given again at once, does not attach to a job that is ending."""
        ends = time.monotonic() + _STOP_WAIT_SECONDS
        with suppress(OSError, RuntimeError, NoSuchJob):
            while self._running and time.monotonic() < ends and not self._impatient.job(self._running).ended:
                time.sleep(_POLL_SECONDS[0])


class JobLog(DriverLog):
    """The log of a job. After a broken connection it comes again from its beginning; what was shown is skipped."""

    def __init__(self, api: JobsApi, name: str, *, uri: str) -> None:
        super().__init__(uri)
        self._api, self._name = api, name
        self._taken, self._rest = 0, ""

    def follow(self) -> bool:
        """Take what is new until the job ends or the connection breaks."""
        before = self._taken
        try:
            asyncio.run(self._tail())
        except TimeoutError as error:
            raise ConnectionError(f"silent for {_SILENT_SECONDS:g} s") from error
        return self._taken != before

    def flush(self) -> None:
        """Take a last line that has no end."""
        if self._rest:
            self.take(self._rest.encode())

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


def _require_success(job: Job, log: JobLog) -> None:
    """The exit code of the driver counts; Ray derives the job's status from it."""
    if job.status == "SUCCEEDED":
        return
    if job.status == "STOPPED":
        raise RemoteFailure(f"Ray job {job.name} was stopped; the same command resumes; log {log.uri}")
    if job.exit_code == NOT_FOUND:
        raise RemoteFailure(
            f"Ray job {job.name} failed: the cluster has no command `ncsn`; install this package in the environment "
            f"that `ray start` runs in, and put its bin folder on that PATH; log {log.uri}"
        )
    how = "no exit code" if job.exit_code is None else f"exit code {job.exit_code}"
    cause = first_error(log.lines()) or " ".join(job.message.split())
    raise RemoteFailure(f"Ray job {job.name} failed ({how}): {cause}; log {log.uri}")
