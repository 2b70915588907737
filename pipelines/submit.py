"""Starts a pipeline on a Kubeflow cluster, once or on a schedule.

Credentials come from the environment or from the token that Kubernetes mounts in a pod, never from an argument.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import kfp_server_api
import urllib3
import yaml
from kfp.client import Client, ServiceAccountTokenVolumeCredentials

from ncsn.config import Config, read_yaml
from ncsn.environment import POD_NAMESPACE
from ncsn.errors import InvalidValue, UserError
from ncsn.remote.backend import message_of
from pipelines import ENDPOINT, TOKEN, KfpError, KfpRefusalError
from pipelines.compile import PIPELINES, compile_one

UI_ENDPOINT = "KF_PIPELINES_UI_ENDPOINT"
COOKIE = "NCSN_KFP_COOKIE"
TOKEN_PATH = "KF_PIPELINES_SA_TOKEN_PATH"  # noqa: S105 - the name of a variable
POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class KfpConnection:
    """A client whose server has answered."""

    client: Client
    host: str
    namespace: str | None  # the user's; None where the server knows no users
    version: str

    def run_url(self, run_id: str, *, kind: str = "runs") -> str:
        """The page of a run, or of a schedule, whose `kind` is `recurringrun`."""
        return f"{os.environ.get(UI_ENDPOINT, self.host).rstrip('/')}/#/{kind}/details/{run_id}"


def connect(host: str | None, *, namespace: str | None = None) -> KfpConnection:
    """A client of the server at `host`, None = KF_PIPELINES_ENDPOINT, after it has answered.

    A Kubeflow of several users needs a namespace; None = that of this pod.
    """
    given, name = (host or os.environ.get(ENDPOINT, "")).rstrip("/"), "--host" if host else ENDPOINT
    if not given:
        example = "http://localhost:8080 after `kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80`"
        raise KfpError("--host", "no Kubeflow given", hint=f"pass it or set {ENDPOINT}, for example {example}")
    try:
        parts = urlsplit(given if "://" in given else f"https://{given}")
    except ValueError as error:
        raise KfpError(name, f"not an address: {error}", value=given) from None
    if parts.username or parts.password:
        shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        hint = f"leave them out, and set {TOKEN} or {COOKIE} in the environment"
        raise KfpError(name, "contains a user or a password", hint=hint, value=shown)
    address, (source, token, cookie, file) = urlunsplit(parts), _credentials()
    bearer = token or (file.read_text().strip() if file else None)
    headers = {"Authorization": f"Bearer {bearer}"} if bearer else {"Cookie": cookie} if cookie else {}
    health = _health(address, headers, source)
    if health.get("multi_user"):
        namespace = namespace or (POD_NAMESPACE.read_text().strip() if POD_NAMESPACE.exists() else None)
        if namespace is None:
            raise KfpError("--namespace", f"missing, and {address} serves several users", hint="pass your profile")
    elif namespace is not None:
        reason = f"{address} serves one user and has no namespaces"
        raise KfpError("--namespace", reason, hint="leave it out", value=namespace)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it needs a server of version 2
        client = Client(
            host=address,
            namespace=namespace or "kubeflow",
            existing_token=token,
            cookies=cookie,
            credentials=ServiceAccountTokenVolumeCredentials(str(file)) if file else None,
        )
    version = health.get("tag_name") or health.get("apiServerTagName")  # the latter through ml-pipeline-ui
    return KfpConnection(client, address, namespace, str(version or "unknown version"))


def _credentials() -> tuple[str, str | None, str | None, Path | None]:
    """Where they come from, and a token, the cookie of a session in the browser, or a file, which is renewed."""
    if token := os.environ.get(TOKEN):
        return TOKEN, token, None, None
    if cookie := os.environ.get(COOKIE):
        return COOKIE, None, cookie, None
    if named := os.environ.get(TOKEN_PATH):
        if not os.access(named, os.R_OK):
            hint = "mount the token of the service account there"
            raise KfpError(TOKEN_PATH, "cannot be read", hint=hint, value=named)
        return TOKEN_PATH, None, None, Path(named)
    if os.access(POD_TOKEN, os.R_OK):
        return str(POD_TOKEN), None, None, POD_TOKEN
    return "no credentials", None, None, None


def reason_of(error: Exception) -> str:
    """The server's message, or how the connection failed."""
    if not isinstance(error, kfp_server_api.ApiException):
        return f"no answer ({str(error).rpartition(': ')[2]})"
    return f"{message_of(error)} ({error.status})"


def _health(address: str, headers: dict[str, str], source: str) -> dict[str, object]:
    """The server's answer to healthz. KFP's client asks too, but for half a minute and without a message."""
    url = f"{address}/apis/v2beta1/healthz"
    try:
        response = urllib3.request("GET", url, headers=headers, timeout=TIMEOUT_SECONDS, retries=False, redirect=False)
    except urllib3.exceptions.HTTPError as error:
        hint = f"check --host or {ENDPOINT}, and that a port-forward is still running"
        raise KfpError(address, f"does not answer ({str(error).rpartition(': ')[2]})", hint=hint) from None
    except ValueError:
        raise KfpError(source, "holds what no header of a request may hold", hint="set it again") from None
    status = response.status
    if status in (401, 403) or 300 <= status < 400:
        what = "refuses" if status > 400 else "sends to a login page:"
        hint = f"set {TOKEN} or {COOKIE} in the environment, or {TOKEN_PATH} inside a cluster"
        raise KfpRefusalError(address, f"{what} {source} (HTTP {status})", hint=hint)
    try:
        answer = json.loads(response.data) if status == 200 else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        said = f"HTTP {status} {response.headers.get('Content-Type', '')}"
        reason = f"not a Kubeflow Pipelines API: {url} answers {said}"
        raise KfpError(address, reason, hint="check the address and its path")
    if answer.get("apiServerReady") is False:  # what ml-pipeline-ui says of the API behind it, with status 200
        raise KfpError(address, "answers, but the API behind it does not", hint="check the Deployment ml-pipeline")
    return answer


@dataclass(frozen=True)
class Submission:
    pipeline: str  # `train`, or another of `PIPELINES` without its ending
    name: str  # of the run, on KFP's page
    arguments: Mapping[str, Any]  # text is read as YAML for a parameter that is no string
    experiment: str  # KFP's
    service_account: str | None = None  # of the pods; None = the cluster's default
    cache: bool = True  # False keeps every task out of KFP's cache
    known: Sequence[str] = ()  # tasks that KFP may cache in addition: the arguments tell all that they depend on
    config: Config | None = None  # decides how large the pods are; None if it is not known
    code: str | None = None  # URI of an archive of the packages that the tasks run; None for those of their image


@dataclass(frozen=True)
class Submitted:
    """A run, or a schedule of runs, that KFP has accepted."""

    id: str
    url: str
    experiment: str


def require_access(connection: KfpConnection) -> None:
    """Ask for something that only a user may see; the health of the server is public."""
    with _refusals(connection, "list experiments"):
        connection.client.list_experiments(page_size=1, namespace=connection.namespace)


def submit(connection: KfpConnection, submission: Submission, *, every: str | None = None) -> Submitted:
    """Start one run; with `every`, a cron expression in UTC, one at a time at those times, none for those missed."""
    doing = f"start {submission.name!r}" if every is None else f"schedule {submission.name!r} by {every!r}"
    with package(submission) as (file, arguments), _refusals(connection, doing):
        client, namespace = connection.client, connection.namespace
        settings: dict[str, Any] = {
            "experiment_id": client.create_experiment(submission.experiment, namespace=namespace).experiment_id,
            "job_name": submission.name,
            "pipeline_package_path": str(file),
            "params": arguments,
            "service_account": submission.service_account,
        }
        if every is None:
            started = client.run_pipeline(**settings).run_id
        else:
            # KFP's first field is the second; people write minute, hour, day, month and weekday.
            cron = f"0 {every.strip()}" if len(every.split()) == 5 else every
            settings |= {"cron_expression": cron, "max_concurrency": 1, "no_catchup": True}
            started = client.create_recurring_run(**settings).recurring_run_id
    url = connection.run_url(started, kind="recurringrun" if every else "runs")
    return Submitted(started, url, submission.experiment)


@contextlib.contextmanager
def package(submission: Submission) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The compiled pipeline in a temporary file, and the arguments, checked before anything is sent."""
    name = f"{submission.pipeline}_pipeline"
    if name not in PIPELINES:
        choices = ", ".join(known.removesuffix("_pipeline") for known in PIPELINES)
        raise UserError("--pipeline", "no such pipeline", hint=f"choose one of {choices}", value=submission.pipeline)
    with tempfile.TemporaryDirectory(prefix="ncsn-") as folder:
        path = compile_one(name, Path(folder), submission.config, code=submission.code)
        spec, *platforms = yaml.safe_load_all(path.read_text())
        arguments = arguments_for(spec, submission.arguments)
        # In all graphs; KFP's client would miss the tasks inside an exit handler.
        for component in (spec["root"], *spec["components"].values()):
            for task_name, task in component.get("dag", {}).get("tasks", {}).items():
                if not submission.cache:
                    task["cachingOptions"] = {}
                elif task_name in submission.known:
                    task["cachingOptions"] = {"enableCache": True}
        path.write_text(yaml.safe_dump_all([spec, *platforms], sort_keys=True))
        yield path, arguments


def arguments_for(spec: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in the types of the parameters of a compiled pipeline; text is YAML where no text is asked for."""
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    for name in given.keys() - known.keys():
        raise UserError("--param", "unknown parameter", hint=f"choose of {', '.join(sorted(known))}", value=name)
    for name, parameter in known.items():
        if name not in given and "defaultValue" not in parameter and not parameter.get("isOptional"):
            hint = f"pass --param {name}=VALUE: {parameter.get('description', '')}"
            raise UserError("--param", f"the pipeline needs {name}", hint=hint)
    texts = {name for name, parameter in known.items() if parameter["parameterType"] == "STRING"}
    is_yaml = {name: isinstance(value, str) and name not in texts for name, value in given.items()}
    try:
        return {name: read_yaml(value) if is_yaml[name] else value for name, value in given.items()}
    except InvalidValue as error:
        raise UserError("--param", str(error), value=dict(given)) from None


@contextlib.contextmanager
def _refusals(connection: KfpConnection, doing: str) -> Iterator[None]:
    """Turn the server's refusal into a `KfpError`."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # KFP's client prints links
            yield
    except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError) as error:
        hints = {401: "renew the token or cookie", 403: "ask for the right to create runs there"}
        hint = hints.get(getattr(error, "status", 0), "")
        raise KfpError(connection.host, f"cannot {doing}: {reason_of(error)}", hint=hint) from None
