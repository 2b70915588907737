"""Ray's Jobs API over REST, as specified in Ray's documentation (doc/source/cluster/.../job-submission/openapi.yml)."""

from __future__ import annotations

import copy
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import aiohttp
import requests

from ncsn.errors import UserError
from ncsn.remote.backend import PATIENCE_SECONDS, Conflict, Unavailable, keep_asking

FIRST_PATIENCE_SECONDS = 10.0  # for the first answer: a wrong address is more likely than an outage

_ADDRESS_KEY = "compute.ray_jobs.address"
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TIMEOUTS = (5, 60)
_VERSION = "/api/version"
_UNAVAILABLE = {429, 502, 503, 504}
_NO_AGENT = "No available agent"
_LAST_OF_HEADERS = 255  # code of the last character that a header may hold
_KUBERNETES_TOKEN = Path("/var/run/secrets/ray.io/serviceaccount/token")


class NoSuchJob(LookupError):
    """The cluster knows no job of that name."""


class Refused(RuntimeError):
    """The cluster refuses a request."""


@dataclass(frozen=True)
class Job:
    """A job as the cluster describes it."""

    name: str
    status: str
    metadata: Mapping[str, str]
    started: int  # milliseconds since 1970
    message: str
    exit_code: int | None  # of its driver

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Self:
        """The job as JSON says it."""
        labels, started, message = found["metadata"] or {}, found["start_time"] or 0, found["message"] or ""
        return cls(found["submission_id"], found["status"], labels, started, message, found["driver_exit_code"])

    @property
    def ended(self) -> bool:
        """Whether its status is final."""
        return self.status in {"STOPPED", "SUCCEEDED", "FAILED"}


class JobsApi:
    """The Jobs API of the cluster whose dashboard is at `address`; None = RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    Ray's own client waits forever or gives up at once. This one repeats a request for `patience` seconds, once the
    cluster has answered.
    """

    def __init__(self, address: str | None = None, *, patience: float = PATIENCE_SECONDS) -> None:
        self.address = _address(address)
        self._headers = _token_headers(self.address)
        self._patience = min(patience, FIRST_PATIENCE_SECONDS)
        try:
            found = self._request("GET", _VERSION)
        except NoSuchJob:
            raise self._no_dashboard("HTTP 404") from None
        if not isinstance(found, dict) or "ray_version" not in found:
            raise self._no_dashboard("it names no version of Ray")
        self.ray_version = str(found["ray_version"])
        self._patience = patience
        here = metadata.version("ray")
        if self.ray_version != here:
            raise UserError(
                self.address,
                f"the cluster has Ray {self.ray_version}, but this environment has Ray {here}",
                hint=f"install ray=={self.ray_version} here, or submit from the image that the cluster runs",
            )

    def impatient(self) -> Self:
        """The same cluster, asked once."""
        other = copy.copy(self)
        other._patience = 0
        return other

    def submit(self, name: str, *, entrypoint: str, metadata: dict[str, str], env: dict[str, str]) -> None:
        """Start a job with the code that is installed on the cluster; `entrypoint` is for the head's shell.

        All who may see the dashboard see `metadata` and `env`, the variables of the driver and its workers.

        Raises:
            Conflict: There is, or was, a job of that name.
        """
        job = {"submission_id": name, "entrypoint": entrypoint, "metadata": metadata, "runtime_env": {"env_vars": env}}
        try:
            self._request("POST", "/api/jobs/", job)
        except Refused:
            # Of two submissions at the same moment Ray may refuse one without the reason.
            with suppress(NoSuchJob):
                self.job(name)
                raise Conflict from None
            raise

    def job(self, name: str) -> Job:
        """What is known of a job; raises `NoSuchJob` if that is nothing."""
        return Job.of(self._request("GET", f"/api/jobs/{name}"))

    def jobs(self) -> list[Job]:
        """All submitted jobs that the cluster remembers, oldest first."""
        listed = self._request("GET", "/api/jobs/")
        submitted = [Job.of(each) for each in listed if each["submission_id"] is not None]
        return sorted(submitted, key=lambda job: job.started)

    def stop(self, name: str) -> None:
        """Ask a job to end; without effect if it has ended or is unknown."""
        with suppress(NoSuchJob):
            self._request("POST", f"/api/jobs/{name}/stop")

    async def tail(self, name: str) -> AsyncIterator[str]:
        """Pieces of the driver's output, from its beginning to its end.

        Raises:
            ConnectionError: There is none yet, or the connection broke.
        """
        try:
            async with (
                aiohttp.ClientSession(headers=self._headers) as session,
                session.ws_connect(f"{self.address}/api/jobs/{name}/logs/tail") as socket,
            ):
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.ERROR:
                        raise ConnectionError(str(socket.exception()))
                    yield message.data
                if socket.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
                    raise ConnectionError("closed without a reason")
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionError(str(error)) from error

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of the answer."""
        server = f"the Ray cluster at {self.address}"
        return keep_asking(lambda: self._answer(method, path, body), server=server, seconds=self._patience)

    def _answer(self, method: str, path: str, body: Any) -> Any:
        try:
            # requests reads the environment for proxies and certificates, as Ray's client does.
            response = requests.request(
                method, f"{self.address}{path}", json=body, headers=self._headers, timeout=_TIMEOUTS
            )
        except ValueError as error:
            raise UserError(self.address, f"not an address: {error}") from None
        except OSError as error:
            raise Unavailable(type(error).__name__) from None
        status, message = response.status_code, _last_line(response.text) or response.reason
        if status in _UNAVAILABLE or (status == 500 and _NO_AGENT in response.text):
            raise Unavailable(f"HTTP {status}: {message}")
        if status == 401:
            raise _refusal(self.address, "asks for a token")
        if status == 403:
            raise _refusal(self.address, "does not accept the token")
        if status == 404:
            raise NoSuchJob(message)
        if status != 200:
            raise Refused(f"the Ray cluster at {self.address} refuses (HTTP {status}): {message}")
        try:
            return response.json()
        except requests.JSONDecodeError:
            reason = "it does not answer in JSON"
            if path == _VERSION:
                raise self._no_dashboard(reason) from None
            raise Unavailable(reason) from None  # a proxy's page, since it was a dashboard before

    def _no_dashboard(self, why: str) -> Refused:
        return Refused(f"the server at {self.address} is no Ray dashboard ({why})")


def _last_line(text: str) -> str:
    """The reason, at the end of a traceback or a message."""
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


def _token_headers(address: str) -> dict[str, str]:
    """The token from where Ray looks for it; a token in the environment is sent even if RAY_AUTH_MODE is not set."""
    token, path = os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    mode = os.environ.get("RAY_AUTH_MODE", "token" if token or path else "disabled")
    if mode.lower() != "token":
        return {}
    source = "RAY_AUTH_TOKEN"
    if not token:
        in_pod = os.environ.get("RAY_ENABLE_K8S_TOKEN_AUTH", "").lower() in {"1", "true"}
        file = Path(path) if path else _KUBERNETES_TOKEN if in_pod else Path.home() / ".ray" / "auth_token"
        source, token = str(file), file.read_text(errors="replace") if os.access(file, os.R_OK) else ""
    if not (token := token.strip()):
        raise _refusal(address, "requires a token, and none is set")
    if not token.isprintable() or ord(max(token)) > _LAST_OF_HEADERS:
        raise UserError(source, "holds what no header of a request may hold", hint="set the token again")
    return {"Authorization": f"Bearer {token}"}


def _refusal(address: str, what: str) -> PermissionError:
    return PermissionError(
        f"the Ray cluster at {address} {what}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to "
        "the cluster's own"
    )
