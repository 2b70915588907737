"""Candidates of `ncsn select` as MLflow's logged models: their score and where their weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ncsn.runs.records import now_ms
from ncsn.tracking.mlflow_runs import StepRun

KEY = "ncsn.candidate"  # tag with the digest of the weights and the figure


def log_candidates(tracked: StepRun, model: str, rows: Sequence[Mapping[str, Any]], *, figure: str) -> None:
    """Log each candidate that this run does not have yet; the weights themselves stay in the store.

    Args:
        tracked: The run of the step.
        model: Name of the registered model.
        rows: Candidates: uri, digest, images_seen, relative_width, and value, None if an image is not finite.
        figure: Name of the metric.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    client = tracked.client
    known = client.search_logged_models(
        [tracked.experiment_id], filter_string=f"source_run_id = '{tracked.run_id}'", max_results=1000
    )
    logged = {each.tags.get(KEY) for each in known}
    for row in rows:
        key = f"{row['digest']} {figure}"
        if key in logged:
            continue
        width = {} if row["relative_width"] is None else {"relative_width": f"{row['relative_width']:g}"}
        created = client.create_logged_model(
            tracked.experiment_id,
            name=f"{model}-candidate",
            source_run_id=tracked.run_id,
            tags={KEY: key, "ncsn.checkpoint": row["digest"], "ncsn.checkpoint_uri": row["uri"]},
            params={"images_seen": str(row["images_seen"]), **width},
        )
        step = row["images_seen"]
        client.finalize_logged_model(created.model_id, "FAILED" if row["value"] is None else "READY")
        client.log_outputs(tracked.run_id, [LoggedModelOutput(created.model_id, step=step)])
        if row["value"] is not None:
            metric = Metric(figure, row["value"], now_ms(), step, model_id=created.model_id)
            client.log_batch(tracked.run_id, metrics=[metric], synchronous=True)
