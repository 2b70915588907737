"""Reads back what a run recorded."""

from __future__ import annotations

from ncsn.config import Config
from ncsn.tracking.connection import connect
from ncsn.tracking.lookup import tag_filter
from ncsn.tracking.run import run_identity


def metric_history(config: Config, *, run: str, step: str, name: str) -> list[tuple[int, float]]:
    """The points (images seen, value) of one metric of one step, in their order; empty if there is no such run.

    Raises:
        TrackingError: if the tracking server cannot be used.
    """
    connection = connect(config)
    query = tag_filter({**run_identity(config, run), "ncsn.step": step})
    found = connection.client.search_runs([connection.experiment_id], query, max_results=1)
    points = [
        (metric.step, metric.value)
        for each in found
        for metric in connection.client.get_metric_history(each.info.run_id, name)
    ]
    return sorted(points)
