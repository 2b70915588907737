"""Ray's Jobs API as this package uses it. The only module outside `ncsn.distributed` that imports Ray.

Every call goes on through a head node that is away for a while, and says in one line what a cluster refuses.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import aiohttp
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ncsn.errors import UserError
from ncsn.remote.backend import Conflict, say
from ncsn.storage.retry import Retry

__all__ = ["JobDetails", "JobStatus", "JobsApi", "NoSuchJob"]

PATIENCE_SECONDS = 900.0
FIRST_PATIENCE_SECONDS = 10.0
"""For the first answer: a wrong address is more likely than an outage."""

_ADDRESS_KEY = "compute.ray_jobs.address"
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TIMEOUTS = (5, 60)
_AWAY = {429, 502, 503, 504}
_NO_AGENT = "No available agent"
_EXISTS = "already exists"


# It tells of every connection that it closes.
logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)


class NoSuchJob(LookupError):
    """The cluster knows no job of that id."""


class JobsApi:
    """The Jobs API of one cluster.

    Args:
        address: URL of its dashboard; None for that in RAY_API_SERVER_ADDRESS or RAY_ADDRESS. The token is taken from
            where Ray looks for it: RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH.
        patience: Seconds for which it may be away, once it has answered.

    Raises:
        ConnectionError: if nobody answers there.
        PermissionError: if the token is missing or wrong.
        UserError: if nothing names a cluster, or it has another version of Ray.
    """

    def __init__(self, address: str | None = None, *, patience: float = PATIENCE_SECONDS) -> None:
        self.address = _address(address)
        with _only_address(self.address):
            self._client = _Client(self.address, patience=min(patience, FIRST_PATIENCE_SECONDS))
        self._client.patience = patience
        self.ray_version: str = self._client.get("/api/version")["ray_version"]
        if self.ray_version != ray.__version__:
            raise UserError(
                self.address,
                f"the cluster has Ray {self.ray_version}, this environment has Ray {ray.__version__}",
                hint=f"install ray=={self.ray_version} here, or submit from the image that the cluster runs",
            )

    def submit(self, name: str, *, entrypoint: str, metadata: dict[str, str], env: dict[str, str]) -> None:
        """Start a job. Its code is what is installed in the cluster's environment; nothing is uploaded.

        Args:
            name: Submission id.
            entrypoint: Command line for the head's shell.
            metadata: Shown with the job and handed to its driver.
            env: Variables for the driver and its workers. Everyone who may see the dashboard sees them.

        Raises:
            Conflict: if there is, or ever was, a job of that name.
        """
        try:
            self._client.submit_job(
                entrypoint=entrypoint, submission_id=name, metadata=metadata, runtime_env={"env_vars": env}
            )
        except RuntimeError as error:
            # Of two submissions at the same moment Ray may refuse one without saying why.
            if self._is_known(name):
                raise Conflict(str(error)) from error
            raise

    def _is_known(self, name: str) -> bool:
        try:
            self.job(name)
        except NoSuchJob:
            return False
        return True

    def job(self, name: str) -> JobDetails:
        """What is known of a job.

        Raises:
            NoSuchJob: if the cluster knows none of that name.
        """
        return self._client.get_job_info(name)

    def jobs(self) -> list[JobDetails]:
        """All submitted jobs that the cluster remembers, oldest first."""
        submitted = [job for job in self._client.list_jobs() if job.submission_id is not None]
        return sorted(submitted, key=lambda job: job.start_time or 0)

    def stop(self, name: str) -> None:
        """Ask a job to end; nothing happens if it has, or if there is none."""
        try:
            self._client.stop_job(name)
        except NoSuchJob:
            return

    async def tail(self, name: str) -> AsyncIterator[str]:
        """Pieces of what the driver writes, from its beginning until its end.

        Raises:
            ConnectionError: if there is none yet, or the connection breaks.
        """
        try:
            async for piece in self._client.tail_job_logs(name):
                yield piece
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise ConnectionError(str(error)) from error


class _Unavailable(Exception):
    """The head node does not answer, or answers with a server error."""


def _unavailable(error: Exception) -> str | None:
    return str(error) if isinstance(error, _Unavailable) else None


class _Client(JobSubmissionClient):  # type: ignore[misc, unused-ignore]
    """Ray's client with time limits, patience and errors of one line; Ray's own waits for ever or gives up at once."""

    def __init__(self, address: str, *, patience: float) -> None:
        self.patience = patience
        super().__init__(address)

    def get(self, endpoint: str) -> Any:
        """The JSON at an endpoint."""
        response = self._do_request("GET", endpoint)
        if response.status_code != 200:
            self._raise_error(response)
        return response.json()

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        retry = Retry("the Ray cluster", self.patience, _unavailable, say=say)
        try:
            return retry(partial(self._request_once, method, endpoint, **options))
        except _Unavailable as error:
            raise ConnectionError(
                f"the Ray cluster at {self._address} has not answered for {self.patience:g} s ({error}); what "
                "runs there goes on for a while, and the same command attaches to it again"
            ) from None

    def _request_once(self, method: str, endpoint: str, **options: Any) -> Any:
        try:
            response = super()._do_request(method, endpoint, timeout=_TIMEOUTS, **options)
        except AuthenticationError as error:
            raise PermissionError(_refusal(self._address, str(error))) from None
        except ValueError as error:  # requests' InvalidURL is both
            raise UserError(self._address, f"not an address: {error}") from None
        except OSError as error:
            raise _Unavailable(type(error).__name__) from None
        if response.status_code in _AWAY or (response.status_code == 500 and _NO_AGENT in response.text):
            raise _Unavailable(f"HTTP {response.status_code}: {_last_line(response.text) or response.reason}")
        return response

    def _raise_error(self, r: Any) -> None:
        message = _last_line(r.text) or r.reason
        if r.status_code == 404:
            raise NoSuchJob(message)
        if _EXISTS in message:
            raise Conflict
        raise RuntimeError(f"the Ray cluster at {self._address} refuses (HTTP {r.status_code}): {message}")


def _last_line(text: str) -> str:
    """What went wrong, of a traceback or a message."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _address(given: str | None) -> str:
    addresses = {_ADDRESS_KEY: given} | {name: os.environ.get(name) for name in _ADDRESS_VARIABLES}
    key, address = next(((key, address) for key, address in addresses.items() if address), (_ADDRESS_KEY, None))
    if address is None:
        raise UserError(
            key, "no Ray cluster given", hint=f"pass --address http://HEAD:8265, or set it or {_ADDRESS_VARIABLES[0]}"
        )
    if not address.startswith(("http://", "https://")):
        raise UserError(
            key, "not the address of a Ray dashboard", hint="use an address such as http://HEAD:8265", value=address
        )
    return address.rstrip("/")


@contextmanager
def _only_address(address: str) -> Iterator[None]:
    """Ray lets the environment override what it is told."""
    name = _ADDRESS_VARIABLES[0]
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _refusal(address: str, error: str) -> str:
    what = "asks for a token" if "required" in error else "does not accept the token"
    return (
        f"the Ray cluster at {address} {what}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to "
        "the cluster's own"
    )
