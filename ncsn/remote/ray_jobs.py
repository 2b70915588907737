"""Steps as jobs on a running Ray cluster: submit a job or attach to it, watch it to its end, show its log.

Ray's client does the talking. It is imported late, because it imports Ray.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import requests

from ncsn.answer import answer
from ncsn.config.compute import ComputeConfig
from ncsn.environment import KFP_RUN_ID, RAY_VARIABLES
from ncsn.errors import UserError
from ncsn.progress import say
from ncsn.remote.backend import (
    CHECK_SECONDS,
    PATIENCE_SECONDS,
    Check,
    DriverLog,
    EndedByOther,
    RemoteFailure,
    RemoteLost,
    RemoteStep,
    first_error,
    forwarded_environment,
    is_ours,
    keep_asking,
    refuse_other_work,
)
from ncsn.runs.code import PYTHON, python_version, ray_environment
from ncsn.storage.heartbeat import Heartbeat

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

T = TypeVar("T")

# Keys in the metadata of a job.
RUN, STEP, REQUEST, KFP_RUN, MADE_BY = "ncsn.run", "ncsn.step", "ncsn.request", "ncsn.kfp_run", "ncsn.launcher"
FIRST_PATIENCE_SECONDS = 10.0  # for the first answer: a wrong address is more likely than an outage
NOT_FOUND = 127  # a shell's exit code for an unknown command
STOP_SECONDS = 30  # for a driver that is asked to stop: training saves, and the store and MLflow get the record

_KEY = "compute.ray_jobs.address"
_TIMEOUTS = (5, 60)  # to connect and to answer: Ray's client alone waits forever
_UNAVAILABLE = {429, 502, 503, 504}
_NO_AGENT = "No available agent"  # with HTTP 500, while the head starts
_POLL_SECONDS = (0.5, 2.0)
_STOP_WAIT_SECONDS = 20.0


class Refused(RuntimeError):
    """The dashboard refuses a request."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class RayJobs:
    """The backend `ray-jobs`."""

    def __init__(self, compute: ComputeConfig) -> None:
        self._given = compute.ray_jobs.address
        self._running: str | None = None  # the job that this launcher waits for
        self._about: Mapping[str, str] = {}  # its metadata

    @cached_property
    def address(self) -> str:
        """That of the config, or of the environment, as Ray's client reads it."""
        variable = next((name for name in RAY_VARIABLES if os.environ.get(name)), RAY_VARIABLES[0])
        found = os.environ.get(variable)
        if self._given and found and found.rstrip("/") != self._given.rstrip("/"):
            raise UserError(variable, f"Ray would take it in place of {self._given}", hint="unset it", value=found)
        address, key = self._given or found, _KEY if self._given else variable
        if not address or not address.startswith(("http://", "https://")):
            hint = f"pass --address http://HEAD:8265, or set it or {variable}"
            raise UserError(key if address else _KEY, "not the address of a Ray dashboard", hint=hint, value=address)
        return address.rstrip("/")

    @cached_property
    def _client(self) -> JobSubmissionClient:
        return self._connect(FIRST_PATIENCE_SECONDS)

    def connect(self) -> None:
        _ = self._client

    def execute(self, step: RemoteStep, accepted: Callable[[], None]) -> None:
        """Run the step as a job, or attach to the one that an earlier attempt left; return when it has ended.

        SIGTERM and Ctrl-C stop the job if it `is_ours`.
        """
        self.connect()
        self._running, self._heart = None, Heartbeat(step.lease)
        with self._heart, answer.waiting(lambda: None):
            try:
                name = self._start(step)
                accepted()
                with JobLog(self._client, name, uri=step.log) as log:
                    job = self._watch(name)
                mine = self._about.get(MADE_BY) == self._heart.id or self._ours
                if job.status == "STOPPED" and not mine:
                    raise EndedByOther(f"Ray job {name} was stopped")
            except (KeyboardInterrupt, SystemExit) as told:
                if isinstance(told, KeyboardInterrupt):
                    self._heart.leave()
                self._stop_running()
                raise
            except OSError:  # the work continues while nobody answers
                self._heart.stays = True
                raise
        if job.status == "STOPPED":
            raise RemoteFailure(log.describe(f"Ray job {name} was stopped", "the same command resumes"))
        if job.status != "SUCCEEDED":  # Ray derives it from the exit code of the driver
            cause = str(step.told() or "") or first_error(log.lines) or " ".join((job.message or "").split())
            if job.driver_exit_code == NOT_FOUND:
                cause = "the cluster has no command `ncsn`; install this package in the environment of `ray start`"
            raise RemoteFailure(f"Ray job {name} failed (exit code {job.driver_exit_code}): {log.describe(cause)}")

    def stop(self, *, run: str | None, kfp_run: str | None) -> list[str]:
        wanted = {key: value for key, value in ((RUN, run), (KFP_RUN, kfp_run)) if value}
        if not wanted:
            return []
        running = {name: job for name, job in self._jobs().items() if not job.status.is_terminal()}
        names = [name for name, job in running.items() if wanted.items() <= (job.metadata or {}).items()]
        for name in names:
            self._ask(partial(self._client.stop_job, name))
        return names

    def checks(self) -> Iterator[Check]:
        fix = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE  # and --address http://HEAD:8265"
        yield Check("ray jobs", self._describe, fix)

    def _describe(self) -> str:
        self._connect(CHECK_SECONDS).list_jobs()
        return f"{self.address}: Ray {metadata.version('ray')}, as here"

    def _connect(self, patience: float) -> JobSubmissionClient:
        """Ray's client, of a cluster that has answered and has the same Ray."""
        address = self.address
        headers = None
        if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # else Ray would not send it
        elif not Path("~/.ray/auth_token").expanduser().exists():
            # A process that may start a local cluster is in token mode too, and this cluster may ask for no token.
            headers = {"Authorization": ""}
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):
            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                response = super()._do_request(method, endpoint, timeout=_TIMEOUTS, **options)
                status, text = response.status_code, response.text
                if status in _UNAVAILABLE or (status == 500 and _NO_AGENT in text):
                    raise ConnectionError(f"HTTP {status}: {_last_line(text)}")
                return response

            def _raise_error(self, response: Any) -> None:
                status, reason = response.status_code, _last_line(response.text)
                raise Refused(f"the Ray cluster at {address} refuses (HTTP {status}): {reason}", status)

        try:
            client = self._ask(lambda: Client(address, headers=headers), patience=patience)
            there = client._server_ray_version
        except AuthenticationError as error:
            raise PermissionError(
                f"the Ray cluster at {address} does not let us in ({_first_line(error)}); set RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH to the cluster's own"
            ) from None
        except (requests.exceptions.InvalidHeader, UnicodeError):  # their messages repeat the token
            raise UserError("RAY_AUTH_TOKEN", "holds what no header may hold", hint="set the token again") from None
        except (requests.RequestException, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise UserError(address, f"no Ray dashboard ({_first_line(error)})") from None
        if there != (here := metadata.version("ray")):
            hint = f"install ray=={there} here, or submit from the image that the cluster runs"
            raise UserError(address, f"the cluster has Ray {there}, but this environment has Ray {here}", hint=hint)
        return client

    def _ask(self, call: Callable[[], T], *, patience: float = PATIENCE_SECONDS) -> T:
        return keep_asking(call, server=f"the Ray cluster at {self.address}", seconds=patience)

    def _jobs(self) -> dict[str, JobDetails]:
        """The submitted jobs that the cluster remembers, by name, oldest first."""
        jobs = sorted(self._ask(self._client.list_jobs), key=lambda job: job.start_time or 0)
        return {job.submission_id: job for job in jobs if job.submission_id is not None}

    def _start(self, step: RemoteStep) -> str:
        """The name of the job that does the step. Ray never takes a name twice, so each attempt has a number."""
        attempt = re.compile(rf"{re.escape(step.job_name)}(?:-(\d+))?")
        while True:
            jobs = {int(match[1] or 1): job for name, job in self._jobs().items() if (match := attempt.fullmatch(name))}
            last = jobs.get(max(jobs, default=0))
            if last is not None and not last.status.is_terminal():
                name = str(last.submission_id)
                if (last.metadata or {}).get(REQUEST) != step.request:
                    raise refuse_other_work(name, f"ray job stop {name} --address {self.address}")
                self._running, self._about = name, last.metadata or {}
                end = "ends it" if self._ours else "leaves it to another launcher"
                say(f"attached to Ray job {name}, which is {last.status.value}; Ctrl-C {end}")
                return name
            name = f"{step.job_name}-{max(jobs) + 1}" if jobs else step.job_name
            if self._submit(step, name):
                say(f"Ray job {name} submitted to {self.address}")
                return name

    def _submit(self, step: RemoteStep, name: str) -> bool:
        """Start a job with the step's code or what is installed there; False if another launcher took the name."""
        kfp_run = os.environ.get(KFP_RUN_ID)
        about = {"job_name": step.job_name, RUN: step.run, STEP: step.step, REQUEST: step.request}
        about |= {PYTHON: python_version(), MADE_BY: self._heart.id, **step.facts}
        about |= {KFP_RUN: kfp_run} if kfp_run else {}
        ray = {} if step.code is None else ray_environment(step.code)
        env = {**forwarded_environment(), **ray.get("env_vars", {}), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
        options: dict[str, Any] = {"submission_id": name, "metadata": about, "runtime_env": {**ray, "env_vars": env}}

        def submit() -> bool:
            try:
                self._client.submit_job(entrypoint=shlex.join(step.leased_command), **options)
            except Refused:
                # A name that is taken, by another launcher or by a request of ours whose answer was lost. Of two
                # submissions at the same moment Ray may refuse one without the reason, as if it were unavailable.
                if self._job(name) is None:
                    raise
                return False
            return True

        self._running, self._about = name, about  # before it may run, because this process may be killed meanwhile
        try:
            started = self._ask(submit)
        except Refused:
            self._running = None
            raise
        if not started:
            self._running = None
        return started

    def _job(self, name: str, *, patience: float = PATIENCE_SECONDS) -> JobDetails | None:
        try:
            return self._ask(partial(self._client.get_job_info, name), patience=patience)
        except Refused as refusal:
            if refusal.status != 404:
                raise
            return None

    def _watch(self, name: str) -> JobDetails:
        shown, pause = "", _POLL_SECONDS[0]
        while True:
            job = self._job(name)
            if job is None:
                raise RemoteLost(f"the cluster no longer knows Ray job {name}: its head was restarted")
            if job.status.value != shown:
                shown = job.status.value
                say(f"Ray job {name}: {shown}")
            if job.status.is_terminal():
                return job
            time.sleep(pause)
            pause = min(1.2 * pause, _POLL_SECONDS[1])

    @property
    def _ours(self) -> bool:
        """Whether the job ends with this process. Others come and go: to be asked when it matters."""
        about, this_run = self._about, os.environ.get(KFP_RUN_ID)
        return self._running is not None and is_ours(self._heart, about.get(KFP_RUN), this_run)

    def _stop_running(self) -> None:
        """Wait for the end, so that the same command, given again at once, does not attach to a job that is ending."""
        if self._running is None or not self._ours:
            return
        try:
            self._client.stop_job(self._running)
        except (OSError, RuntimeError) as error:
            self._heart.stays = True
            say(f"Ray job {self._running} could not be stopped ({error}); its driver ends when its lease expires")
        ends = time.monotonic() + _STOP_WAIT_SECONDS
        with suppress(OSError, RuntimeError):
            while time.monotonic() < ends:
                job = self._job(self._running, patience=0)
                if job is None or job.status.is_terminal():
                    return
                time.sleep(_POLL_SECONDS[0])


class JobLog(DriverLog):
    """The log of a job, which the dashboard gives whole."""

    def __init__(self, client: JobSubmissionClient, name: str, *, uri: str) -> None:
        super().__init__(uri)
        self._client, self._name = client, name

    def read(self, *, over: bool) -> list[str]:
        *complete, rest = self._client.get_job_logs(self._name).split("\n")
        return [*complete, *([rest] if over and rest else [])][len(self.lines) :]


def _last_line(text: str) -> str:
    """The reason, at the end of a traceback or a message."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
