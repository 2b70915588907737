"""The tracking server: which one, whether it answers, its pages, and MLflow's database on a local disk.

Importing mlflow takes more than a second, so the functions that use it import it.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock

from ncsn import storage
from ncsn.config import Config
from ncsn.errors import UserError
from ncsn.storage.retry import Retry

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


# The default backend: MLflow refuses to create a new file store, and the registry needs a database.
SQLITE = "sqlite:///"
REMOTE = ("http://", "https://")
SERVERS = (*REMOTE, SQLITE, "postgresql", "mysql", "mssql", "databricks")

UI = "NCSN_MLFLOW_UI"  # variable with the address of MLflow's pages, if that is not the tracking server's own

_VIEW = "?workflowType=machine_learning"  # without it MLflow 3.17 shows its pages for language models

PROBE_SECONDS = 4
_EXAMPLES = "use http://HOST:PORT or sqlite:////absolute/path/mlflow.db"
MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108  (only the parent of a private temporary folder)


class TrackingError(UserError):
    """MLflow cannot be used as configured."""


class ServerAwayError(TrackingError):
    """The tracking server does not answer, or answers with a server error."""


@dataclass(frozen=True)
class Connection:
    """A client of a server that has answered, and the experiment of the runs."""

    client: MlflowClient
    uri: str
    experiment_id: str


def tracking_uri(config: Config) -> str:
    """Absolute URI: `tracking.uri`, else `MLFLOW_TRACKING_URI`, else a SQLite file below a local `storage.root`."""
    return server_uri(config.tracking.uri, root=config.storage.root)


def server_uri(named: str | None, *, root: str) -> str:
    """`tracking_uri` for these values of `tracking.uri` and `storage.root`."""
    uri, root = named or os.environ.get("MLFLOW_TRACKING_URI"), storage.absolute(root)
    key = "tracking.uri" if named else "MLFLOW_TRACKING_URI"
    if not uri:
        if storage.is_local(root):
            return f"{SQLITE}{root}/mlflow.db"
        hint = "set it or MLFLOW_TRACKING_URI to a tracking server"
        raise TrackingError(
            "tracking.uri", f"not set, and storage.root = {root} cannot hold MLflow's database", hint=hint
        )
    try:
        password = named and urlsplit(named).password
        _ = uri.startswith(REMOTE) and urlsplit(uri).port
    except ValueError as error:
        raise TrackingError(key, f"not an address: {error}", hint=_EXAMPLES) from None
    if password:
        reason, hint = (
            "contains a password, and the config is recorded with every run",
            "set MLFLOW_TRACKING_URI instead",
        )
        raise TrackingError(key, reason, hint=hint, value=shown(uri))
    if not uri.startswith(SERVERS):
        raise TrackingError(key, "not a server or database", hint=_EXAMPLES, value=shown(uri))
    if uri.startswith(SQLITE):
        # A Ray worker has another working folder, so a relative file would become another database there.
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    return uri


def connect(config: Config, *, patience: float = 0.0) -> Connection:
    """A client of a server that has answered within `patience` seconds, and the experiment, created if it is new."""
    client, uri = open_client(config, patience=patience)
    with mlflow_errors(uri):
        return Connection(client, uri, _experiment_id(client, uri, config.tracking.experiment))


def open_client(config: Config, *, patience: float = 0.0) -> tuple[MlflowClient, str]:
    """A client for reading, and its server's URI; creates no experiment."""
    uri = tracking_uri(config)
    retry = Retry("MLflow", patience, lambda error: str(error) if isinstance(error, ServerAwayError) else None)
    return retry(lambda: open_client_at(uri)), uri


def open_client_at(uri: str) -> MlflowClient:
    if uri.startswith(REMOTE):
        _probe(uri)
    return client_at(uri)


def client_at(uri: str) -> MlflowClient:
    """A client of this server for both tracking and registry; a new SQLite file gets its tables first."""
    from mlflow.tracking import MlflowClient

    if uri.startswith(SQLITE):
        _create_database(Path(uri.removeprefix(SQLITE)))
    try:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except ValueError as error:
        raise TrackingError(shown(uri), f"not the address of a database: {error}", hint=_EXAMPLES) from None


def server_command(config: Config, *, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command that serves MLflow's pages for a local database."""
    uri = tracking_uri(config)
    if uri.startswith((*REMOTE, "databricks")):
        raise TrackingError("tracking.uri", "a server with its own pages", hint=f"open {shown(uri)}", value=shown(uri))
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri]
    if uri.startswith(SQLITE):
        database = Path(uri.removeprefix(SQLITE))
        _create_database(database)
        command += ["--artifacts-destination", _artifacts_uri(database)]
    return command


def page(uri: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page; empty for a database, which has none."""
    served = os.environ.get(UI) or (shown(uri) if uri.startswith(REMOTE) else "")
    return f"{served.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}{_VIEW}" if served else ""


def runs_page(config: Config, *, served: str) -> str:
    """The address of the experiment's runs in the pages at `served`; the start page if there are none yet."""
    experiment = client_at(tracking_uri(config)).get_experiment_by_name(config.tracking.experiment)
    return f"{served}/#/experiments/{experiment.experiment_id}/runs{_VIEW}" if experiment else served


def shown(uri: str) -> str:
    """The URI without user name and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def one_line(error: Exception) -> str:
    """The first line of an error; MLflow's continue with SQL and links."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def mlflow_errors(uri: str, prefix: str = "") -> Iterator[None]:
    """Turn an error of MLflow in the block into a `TrackingError` that names the server."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise TrackingError(shown(uri), f"{prefix}{one_line(error)}") from error


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    location = _artifacts_uri(Path(uri.removeprefix(SQLITE))) if uri.startswith(SQLITE) else None
    try:
        if client.get_experiment_by_name(name) is None:
            return client.create_experiment(name, artifact_location=location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process has created it meanwhile
            raise
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            "tracking.experiment", "deleted in MLflow", hint="restore it or choose another name", value=name
        )
    return str(experiment.experiment_id)


def _artifacts_uri(database: Path) -> str:
    return database.with_name("mlartifacts").as_uri()


def _create_database(path: Path) -> None:
    """Publish a database with all tables at `path`, unless there is one."""
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # MLflow's fifty migrations each wait for the disk, and two processes that start at once break each other's. So the
    # file is made in memory, under a lock, and appears when it is complete.
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        memory = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="ncsn-", dir=memory) as folder:
            database = Path(folder) / "mlflow.db"
            SqlAlchemyStore(f"{SQLITE}{database}", _artifacts_uri(path)).engine.dispose()  # type: ignore[no-untyped-call]
            # With it readers and the writer do not wait for each other, and a commit waits for the disk once.
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
            with storage.local_file(path) as temporary:
                shutil.copyfile(database, temporary)


def _probe(uri: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        response = http_request(  # type: ignore[no-untyped-call]
            get_default_host_creds(uri),  # type: ignore[no-untyped-call]
            "/api/2.0/mlflow/experiments/get-by-name",
            "GET",
            params={"experiment_name": "Default"},
            max_retries=1,
            backoff_factor=0,
            backoff_jitter=0.0,
            timeout=PROBE_SECONDS,
            raise_on_status=False,
        )
    except MlflowException as error:
        hint = "start it, or set tracking.uri or MLFLOW_TRACKING_URI"
        raise ServerAwayError(shown(uri), "the tracking server does not answer", hint=hint) from error
    if response.status_code in (401, 403):
        hint = "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        raise TrackingError(
            shown(uri), f"the tracking server refuses the request (HTTP {response.status_code})", hint=hint
        )
    if response.status_code >= 500:
        reason = f"the tracking server answers with HTTP {response.status_code}"
        raise ServerAwayError(shown(uri), reason, hint="check its log")


BATCH = 100  # parameters per request: MLflow's limit


def tag_filter(tags: Mapping[str, str]) -> str:
    """MLflow's search expression for these tags."""
    return " and ".join(f"tags.`{key}` = {quoted(value)}" for key, value in tags.items())


def quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Record parameters; MLflow's do not change."""
    from mlflow.entities import Param

    entries = [Param(key, str(value)) for key, value in params.items()]
    for first in range(0, len(entries), BATCH):
        client.log_batch(run_id, params=entries[first : first + BATCH], synchronous=True)


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()], synchronous=True)


def insert_or_find(write: Callable[[], object]) -> None:
    """Repeat a write that another process makes at the same time: the second insert finds the first one's row."""
    # MLflow looks first and inserts what it did not find; of two that did not, the database refuses the second
    # (BAD_REQUEST).
    from mlflow.exceptions import MlflowException

    for attempts_left in (2, 1, 0):
        try:
            write()
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST" or not attempts_left:
                raise
        else:
            return
