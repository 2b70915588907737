"""Runs by their tags, and parameters and tags in requests as large as MLflow takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ncsn import storage
from ncsn.tracking.connection import Connection

if TYPE_CHECKING:
    from mlflow.entities import Param, Run
    from mlflow.tracking import MlflowClient

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
