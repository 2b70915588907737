"""A client of a Kubeflow Pipelines API that has answered, or one line that says why there is none.

Credentials come from the environment or from the token that Kubernetes mounts in a pod, never from an argument.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import kfp_server_api
import urllib3
from kfp.client import Client, ServiceAccountTokenVolumeCredentials

from ncsn.errors import UserError
from ncsn.remote.backend import message_of

ENDPOINT = "KF_PIPELINES_ENDPOINT"
UI_ENDPOINT = "KF_PIPELINES_UI_ENDPOINT"
TOKEN = "NCSN_KFP_TOKEN"  # noqa: S105 - the name of a variable
COOKIE = "NCSN_KFP_COOKIE"
TOKEN_PATH = "KF_PIPELINES_SA_TOKEN_PATH"  # noqa: S105 - the name of a variable
POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT_SECONDS = 10


class KfpError(UserError):
    """The Kubeflow Pipelines API cannot be used as configured."""


class KfpRefusalError(KfpError):
    """The API refuses the credentials."""


@dataclass(frozen=True)
class Connection:
    """A client whose server has answered."""

    client: Client
    host: str
    namespace: str | None  # the user's; None where the server knows no users
    version: str

    def experiment_id(self, name: str) -> str:
        """That of KFP's experiment, which is made if there is none."""
        return str(self.client.create_experiment(name, namespace=self.namespace).experiment_id)

    def run_url(self, run_id: str, *, kind: str = "runs") -> str:
        """The page of a run, or of a schedule, whose `kind` is `recurringrun`."""
        return f"{os.environ.get(UI_ENDPOINT, self.host).rstrip('/')}/#/{kind}/details/{run_id}"


def connect(host: str | None, *, namespace: str | None = None) -> Connection:
    """A client of the server at `host`, None = KF_PIPELINES_ENDPOINT, after it has answered.

    A Kubeflow of several users needs a namespace; None = that of this pod.
    """
    address, (source, token, cookie, file) = _endpoint(host), _credentials()
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
    return Connection(client, address, namespace, str(version or "unknown version"))


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


def _endpoint(host: str | None) -> str:
    """The address of the API: `host`, else the environment's."""
    address, name = (host or os.environ.get(ENDPOINT, "")).rstrip("/"), "--host" if host else ENDPOINT
    if not address:
        example = "http://localhost:8080 after `kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80`"
        raise KfpError("--host", "no Kubeflow given", hint=f"pass it or set {ENDPOINT}, for example {example}")
    try:
        parts = urlsplit(address if "://" in address else f"https://{address}")
    except ValueError as error:
        raise KfpError(name, f"not an address: {error}", value=address) from None
    if parts.username or parts.password:
        shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        hint = f"leave them out, and set {TOKEN} or {COOKIE} in the environment"
        raise KfpError(name, "contains a user or a password", hint=hint, value=shown)
    return urlunsplit(parts)


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
