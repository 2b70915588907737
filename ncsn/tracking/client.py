"""The tracking server: which one, whether it answers, its pages, and MLflow's database on a local disk.

Importing mlflow takes more than a second, so the functions that use it import it.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from ncsn import storage
from ncsn.config import Config
from ncsn.errors import UserError, without_users
from ncsn.storage.retry import Retry

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


# The default backend: MLflow refuses to create a new file store, and the registry needs a database.
SQLITE = "sqlite:///"
REMOTE = ("http://", "https://")
SERVERS = (*REMOTE, SQLITE, "postgresql", "mysql", "mssql", "databricks")

UI = "NCSN_MLFLOW_UI"  # variable with the address of MLflow's pages, if that is not the tracking server's own

VIEW = "?workflowType=machine_learning"  # without it MLflow 3.17 shows its pages for language models

_ARTIFACTS = "mlartifacts"  # the folder beside a database of ours
_HERE = ("127.0.0.1", "localhost", "::1")  # hosts whose folders are those of this machine
# Table and column of what may be an address below the folder of the database.
_ADDRESSES = (
    *(("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location")),
    *(("model_versions", "source"), ("model_versions", "storage_location"), ("datasets", "dataset_source")),
    *(("params", "value"), ("tags", "value"), ("model_version_tags", "value"), ("logged_model_tags", "tag_value")),
)
_LOCKED_SECONDS = 60  # how long another process may be writing

PROBE_SECONDS = 4
_EXAMPLES = "use http://HOST:PORT or sqlite:////absolute/path/mlflow.db"
MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108  (only the parent of a private temporary folder)


class TrackingError(UserError):
    """MLflow cannot be used as configured."""


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
    if not uri:
        if storage.is_local(root):
            return f"{SQLITE}{root}/mlflow.db"
        reason = f"not set, and storage.root = {root} cannot hold MLflow's database"
        raise TrackingError("tracking.uri", reason, hint="set it or MLFLOW_TRACKING_URI to a tracking server")
    key = "tracking.uri" if named else "MLFLOW_TRACKING_URI"
    try:
        _ = urlsplit(uri).port
    except ValueError as error:
        raise TrackingError(key, f"not an address: {error}", hint=_EXAMPLES) from None
    if not uri.startswith(SERVERS):
        raise TrackingError(key, "not a server or database", hint=_EXAMPLES, value=without_users(uri))
    if uri.startswith(SQLITE):
        # A Ray worker has another working folder, so a relative file would become another database there.
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    return uri


def connect(config: Config, *, patience: float = 0.0) -> Connection:
    """A client of a server that has answered within `patience` seconds, and the experiment, created if it is new."""
    uri, name, location = tracking_uri(config), config.tracking.experiment, None
    client = client_at(uri, patience=patience)
    if uri.startswith(SQLITE):
        location = Path(uri.removeprefix(SQLITE)).with_name(_ARTIFACTS).as_uri()
    with mlflow_errors(uri):
        while (experiment := client.get_experiment_by_name(name)) is None:
            with suppress_exists():
                client.create_experiment(name, artifact_location=location)
    if uri.startswith(REMOTE) and urlsplit(uri).hostname not in _HERE:
        kept = str(experiment.artifact_location)
        if urlsplit(kept).scheme in ("", "file"):  # who made it chose a folder that MLflow's client would write to
            reason = f"keeps its files in the folder {kept}, which MLflow's client takes for one of this machine"
            raise TrackingError("tracking.experiment", reason, hint="name another one", value=name)
    return Connection(client, uri, str(experiment.experiment_id))


def client_at(uri: str, *, patience: float = 0.0) -> MlflowClient:
    """A client for tracking and registry of a server that has answered; a new SQLite file gets its tables first."""
    from mlflow.tracking import MlflowClient

    if uri.startswith(REMOTE):
        _probe(uri, patience=patience)
    if uri.startswith(SQLITE):
        _create_database(Path(uri.removeprefix(SQLITE)))
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def server_command(uri: str, *, host: str = "127.0.0.1", port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """The command that serves MLflow's pages for a database, and its variables, since the words may be seen by all."""
    if uri.startswith((*REMOTE, "databricks")):
        raise TrackingError(
            "tracking.uri", "a server with its own pages", hint=f"open {without_users(uri)}", value=without_users(uri)
        )
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level=warning"]  # no line for each request
    if uri.startswith(SQLITE):
        database = Path(uri.removeprefix(SQLITE))
        _create_database(database)
        command += ["--artifacts-destination", database.with_name(_ARTIFACTS).as_uri()]
    return command, {"MLFLOW_BACKEND_STORE_URI": uri}


def page(uri: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page; empty for a database, which has none."""
    served = os.environ.get(UI) or (without_users(uri) if uri.startswith(REMOTE) else "")
    return f"{served.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}{VIEW}" if served else ""


def one_line(error: Exception) -> str:
    """The first line of an error without passwords; MLflow's continue with SQL and links."""
    text = without_users(str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def suppress_exists() -> Iterator[None]:
    """Let the block create what is there already, perhaps from another process."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """Turn an error of MLflow in the block into a `TrackingError` that names the server."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        error.args = (without_users(str(error)),)  # what a traceback shows
        raise TrackingError(without_users(uri), one_line(error)) from error


def _create_database(path: Path) -> None:
    """Publish a database with all tables at `path`, unless there is one.

    One that was moved or copied here names its files and those of the store where they are now.
    """
    if path.exists():
        # MLflow makes an absolute address of each relative one that it is given.
        try:
            with closing(sqlite3.connect(path, timeout=_LOCKED_SECONDS)) as connection, connection:
                row = connection.execute("SELECT artifact_location FROM experiments WHERE experiment_id = 0").fetchone()
                before, now = Path(unquote(urlsplit(row[0] if row else "").path)), path.parent
                if before.parent.name != _ARTIFACTS or before.parents[1] == now:
                    return
                for form in (str, Path.as_uri, lambda path: f'{{"uri": {json.dumps(str(path))[:-1]}'):
                    old, new = form(before.parents[1]), form(now)
                    for table, column in _ADDRESSES:
                        connection.execute(
                            f"UPDATE {table} SET {column} = ? || substr({column}, ?)"  # noqa: S608 - ours
                            f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                            (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
                        )
                places = (f"{SQLITE}{place}/" for place in (before.parents[1], now))  # in the code of a card
                connection.execute("UPDATE model_versions SET description = replace(description, ?, ?)", (*places,))
        except sqlite3.Error as error:
            raise TrackingError(f"{SQLITE}{path}", f"cannot be used: {error}") from error
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # MLflow's fifty migrations each wait for the disk, and two processes that start at once break each other's. So the
    # file is made in memory, under a lock, and appears when it is complete.
    storage.make_store(str(path.parent))
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        memory = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="ncsn-", dir=memory) as folder:
            database = Path(folder) / "mlflow.db"
            SqlAlchemyStore(f"{SQLITE}{database}", path.with_name(_ARTIFACTS).as_uri()).engine.dispose()  # type: ignore[no-untyped-call]
            # With it readers and the writer do not wait for each other, and a commit waits for the disk once.
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
            with storage.local_file(path) as temporary:
                shutil.copyfile(database, temporary)


def _probe(uri: str, *, patience: float) -> None:
    """Ask a server for its health; MLflow's own requests wait two minutes for one that is not there."""
    import requests
    from mlflow.utils.credentials import get_default_host_creds

    verify = get_default_host_creds(uri).verify  # type: ignore[no-untyped-call]

    def ask() -> None:
        status = requests.get(f"{uri.rstrip('/')}/health", timeout=PROBE_SECONDS, verify=verify).status_code
        if status >= 500:
            raise ConnectionError(f"HTTP {status}")

    try:
        Retry("MLflow", patience)(ask)
    except requests.RequestException as error:
        hint = "start it, or set tracking.uri or MLFLOW_TRACKING_URI"
        raise TrackingError(without_users(uri), "the tracking server does not answer", hint=hint) from error
    except ConnectionError as error:
        raise TrackingError(
            without_users(uri), f"the tracking server answers with {error}", hint="check its log"
        ) from None


def tag_filter(tags: Mapping[str, str]) -> str:
    """MLflow's search expression for these tags."""
    quoted = {key: f'"{value}"' if "'" in value else f"'{value}'" for key, value in tags.items()}
    return " and ".join(f"tags.`{key}` = {value}" for key, value in quoted.items())
