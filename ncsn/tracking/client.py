"""Where runs are recorded: which tracking server, whether it answers, and MLflow's database on a local disk.

Importing mlflow takes more than a second, so it is imported inside the functions that use it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock

from ncsn import storage
from ncsn.config import Config
from ncsn.errors import UserError
from ncsn.storage.retry import Retry

if TYPE_CHECKING:
    from mlflow.entities import Param, Run
    from mlflow.tracking import MlflowClient


# The default backend: MLflow refuses to create a new file store, and the registry needs a database.
SQLITE = "sqlite:///"
REMOTE = ("http://", "https://")
SERVERS = (*REMOTE, SQLITE, "postgresql", "mysql", "mssql", "databricks")

UI = "NCSN_MLFLOW_UI"
"""Variable with the address of MLflow's pages for people, where that is not the tracking server's own."""

_VIEW = "?workflowType=machine_learning"  # without it MLflow 3.17 shows its pages for language models

PROBE_SECONDS = 4
MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108  (only the parent of a private temporary folder)


class TrackingError(UserError):
    """MLflow cannot be used as configured."""


class ServerAwayError(TrackingError):
    """The tracking server does not answer, or answers with a server error."""


@dataclass(frozen=True)
class Connection:
    """An MLflow client that answered, and where its runs go."""

    client: MlflowClient
    uri: str
    experiment_id: str


def tracking_uri(config: Config) -> str:
    """Absolute URI of the tracking server or database.

    `tracking.uri`, else `MLFLOW_TRACKING_URI`, else a SQLite file below a local `storage.root`.

    Raises:
        TrackingError: if the store is not a local folder and nothing names a server, or for a folder of run files,
            which MLflow does not serve any more.
    """
    return server_uri(config.tracking.uri, root=config.storage.root)


def server_uri(named: str | None, *, root: str) -> str:
    """What `tracking_uri` gives for these values of `tracking.uri` and `storage.root`."""
    uri = named or os.environ.get("MLFLOW_TRACKING_URI")
    root = storage.absolute(root)
    if not uri and not storage.is_local(root):
        raise TrackingError(
            "tracking.uri",
            f"not set, and storage.root = {root} cannot hold MLflow's database",
            hint="set it or MLFLOW_TRACKING_URI to a tracking server",
        )
    uri = uri or f"{SQLITE}{root}/mlflow.db"
    if named and urlsplit(named).password:
        raise TrackingError(
            "tracking.uri",
            "contains a password, and the config is recorded with every run",
            hint="set MLFLOW_TRACKING_URI in the environment instead",
            value=shown(uri),
        )
    if not uri.startswith(SERVERS):
        raise TrackingError(
            "tracking.uri" if named else "MLFLOW_TRACKING_URI",
            "not a server or database",
            hint="use http://HOST:PORT or sqlite:////absolute/path/mlflow.db",
            value=shown(uri),
        )
    if uri.startswith(SQLITE):
        # A Ray worker has another working folder, so a relative file would become another database there.
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    return uri


def connect(config: Config, *, patience: float = 0.0) -> Connection:
    """A client whose server has answered, with the experiment created if it is new.

    Args:
        config: The experiment.
        patience: Seconds to wait for a server that is away. Without, it takes at most about ten to find that it does
            not answer, where MLflow alone retries for minutes.

    Raises:
        TrackingError: if the server does not answer, refuses the credentials, or the experiment is deleted.
    """
    retry = Retry("MLflow", patience, _unavailable, pauses=(1.0, 1.0))
    client, uri = retry(partial(open_client, config))
    from mlflow.exceptions import MlflowException

    try:
        experiment_id = _experiment_id(client, uri, config.tracking.experiment)
    except MlflowException as error:
        raise TrackingError(shown(uri), one_line(error)) from error
    return Connection(client=client, uri=uri, experiment_id=experiment_id)


def open_client(config: Config) -> tuple[MlflowClient, str]:
    """A client and the URI that it talks to, for reading; creates no experiment.

    Raises:
        TrackingError: if the server does not answer.
    """
    uri = tracking_uri(config)
    return open_client_at(uri, experiment=config.tracking.experiment), uri


def open_client_at(uri: str, *, experiment: str = "Default") -> MlflowClient:
    """`open_client` for a server that is known already.

    Raises:
        TrackingError: if the server does not answer.
    """
    if uri.startswith(REMOTE):
        _probe(uri, experiment)
    return client_at(uri)


def _unavailable(error: Exception) -> str | None:
    return error.problems[0].reason if isinstance(error, ServerAwayError) else None


def client_at(uri: str) -> MlflowClient:
    """A client of exactly this server, for tracking and registry both; a new SQLite file gets its tables first."""
    from mlflow.tracking import MlflowClient

    if uri.startswith(SQLITE):
        _create_database(Path(uri.removeprefix(SQLITE)))
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def server_command(config: Config, *, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command that serves MLflow's pages for a local database, to `exec`.

    Raises:
        TrackingError: if the runs are on a server already; the message has its address.
    """
    uri = tracking_uri(config)
    if uri.startswith((*REMOTE, "databricks")):
        raise TrackingError(
            "tracking.uri", "already a server with its own pages", hint=f"open {shown(uri)}", value=shown(uri)
        )
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri]
    if uri.startswith(SQLITE):
        database = Path(uri.removeprefix(SQLITE))
        _create_database(database)
        command += ["--artifacts-destination", _artifacts_uri(database)]
    return command


def page(uri: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page; empty where the record is a database, of which nobody serves pages."""
    served = os.environ.get(UI) or (shown(uri) if uri.startswith(REMOTE) else "")
    return f"{served.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}{_VIEW}" if served else ""


def runs_page(config: Config, *, served: str) -> str:
    """The address of the experiment's runs in the pages at `served`; their start if there are none yet."""
    experiment = client_at(tracking_uri(config)).get_experiment_by_name(config.tracking.experiment)
    return f"{served}/#/experiments/{experiment.experiment_id}/runs{_VIEW}" if experiment else served


def shown(uri: str) -> str:
    """The URI without user name and password, for messages and records."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def one_line(error: Exception) -> str:
    """The first line of an error, for a message; MLflow's go on with SQL and links."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = _artifacts_uri(Path(uri.removeprefix(SQLITE))) if uri.startswith(SQLITE) else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return _experiment_id(client, uri, name)
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            "tracking.experiment", "deleted in MLflow", hint="restore it or choose another name", value=name
        )
    return str(experiment.experiment_id)


def _artifacts_uri(database: Path) -> str:
    return database.with_name("mlartifacts").as_uri()


def _create_database(path: Path) -> None:
    """Publish a database with all tables at `path`, unless one is there.

    MLflow creates the tables by some fifty migrations, each with its own wait for the disk, and two processes that
    start at once break each other's. So the file is made in memory, under a lock, and appears when complete.
    """
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        memory = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="ncsn-", dir=memory) as folder:
            database = Path(folder) / "mlflow.db"
            SqlAlchemyStore(f"{SQLITE}{database}", _artifacts_uri(path)).engine.dispose()  # type: ignore[no-untyped-call]
            # Readers and the one writer then do not wait for each other, and a commit waits for the disk only once.
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
            temporary = path.with_name(f".{path.name}.tmp")
            shutil.copyfile(database, temporary)
            os.replace(temporary, path)


def _probe(uri: str, experiment: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        response = http_request(  # type: ignore[no-untyped-call]
            get_default_host_creds(uri),  # type: ignore[no-untyped-call]
            "/api/2.0/mlflow/experiments/get-by-name",
            "GET",
            params={"experiment_name": experiment},
            max_retries=1,
            backoff_factor=0,
            backoff_jitter=0.0,
            timeout=PROBE_SECONDS,
            raise_on_status=False,
        )
    except MlflowException as error:
        raise ServerAwayError(
            shown(uri),
            "the tracking server does not answer",
            hint="start it, or set tracking.uri or MLFLOW_TRACKING_URI",
        ) from error
    if response.status_code in (401, 403):
        raise TrackingError(
            shown(uri),
            f"the tracking server refuses the request (HTTP {response.status_code})",
            hint="check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        )
    if response.status_code >= 500:
        raise ServerAwayError(
            shown(uri), f"the tracking server answers with HTTP {response.status_code}", hint="check its log"
        )


PARAM_LENGTH = 6000
BATCH = 100
"""Parameters, or tags, per request: MLflow's limit."""


def find_or_create(
    connection: Connection, identity: Mapping[str, str], *, tags: Mapping[str, str], name: str, claims: str
) -> Run:
    """The run with the tags `identity`, set to running, or a new one.

    MLflow has no condition on creating a run, so where two processes create one at once the store decides.

    Args:
        connection: The server and the experiment.
        identity: Tags that name the run.
        tags: More tags of the run.
        name: Name of a new run.
        claims: Folder in the store.
    """
    client, query = connection.client, tag_filter(identity)
    found = _search(connection, query)
    run = found or client.create_run(connection.experiment_id, run_name=name, tags={**identity, **tags})
    first = _first_claimed(connection, query, run, claims)
    if first is not None:
        if found is None:
            client.delete_run(run.info.run_id)
        run = first
    if first is not None or found is not None:
        set_tags(client, run.info.run_id, {**identity, **tags})
        client.update_run(run.info.run_id, status="RUNNING")
    return run


def _first_claimed(connection: Connection, query: str, run: Run, claims: str) -> Run | None:
    """The run that another process has claimed for this query; None if it is `run`, which then is claimed.

    A run that was found is claimed as well: its process may not have come to that, and would delete it if it lost.
    """
    run_id = run.info.run_id
    claim = storage.join(claims, hashlib.sha256(f"{connection.uri} {query}".encode()).hexdigest()[:16])
    if storage.publish_once(claim, run_id.encode()) or (claimed := storage.read_text(claim)) == run_id:
        return None
    first = _search(connection, f"{query} and attributes.run_id = '{claimed}'")
    if first is None:
        storage.write_text(claim, run_id)  # that one was deleted since
    return first


def _search(connection: Connection, query: str) -> Run | None:
    order = ["attributes.start_time ASC"]
    found = connection.client.search_runs([connection.experiment_id], query, max_results=1, order_by=order)
    return found[0] if found else None


def tag_filter(tags: Mapping[str, str]) -> str:
    """MLflow's search expression for runs with all of these tags."""
    quoted = {key: f'"{value}"' if "'" in value else f"'{value}'" for key, value in tags.items()}
    return " and ".join(f"tags.`{key}` = {value}" for key, value in quoted.items())


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Add the parameters that the run does not have yet; MLflow's do not change."""
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    wanted = {key: Param(key, str(value)[:PARAM_LENGTH]) for key, value in params.items()}
    while new := _without_known(client, run_id, wanted):
        try:
            client.log_batch(run_id, params=new[:BATCH], synchronous=True)
        except MlflowException:
            # Another process may have added some since they were looked up, and MLflow refuses the whole batch.
            if len(_without_known(client, run_id, wanted)) >= len(new):
                raise


def _without_known(client: MlflowClient, run_id: str, wanted: Mapping[str, Param]) -> list[Param]:
    known = client.get_run(run_id).data.params
    return [param for key, param in wanted.items() if key not in known]


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags, replacing those of the same name."""
    from mlflow.entities import RunTag

    entries = [RunTag(key, str(value)) for key, value in tags.items()]
    for first in range(0, len(entries), BATCH):
        client.log_batch(run_id, tags=entries[first : first + BATCH], synchronous=True)


_ATTEMPTS = 3


def insert_or_find(write: Callable[[], object]) -> None:
    """Make a write of MLflow that leaves or replaces what is there, also while another process makes the same one.

    MLflow looks first and inserts what it did not find; of two that did not find it, the database refuses the second
    (BAD_REQUEST), which finds it when it tries again.
    """
    from mlflow.exceptions import MlflowException

    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            write()
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST" or not attempts_left:
                raise
        else:
            return
