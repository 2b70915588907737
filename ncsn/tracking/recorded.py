"""What MLflow holds of a pipeline run: its own entry and those of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ncsn.tracking.connection import page, shown
from ncsn.tracking.provenance import kfp_run
from ncsn.tracking.run import StepRun

if TYPE_CHECKING:
    from mlflow.entities import Run

MOST_STEPS = 1000


@dataclass(frozen=True)
class RecordedRun:
    """One run in MLflow.

    Attributes:
        run_id: Its id.
        tags: Its tags.
        page: Address of its page; empty if the runs are not on a server.
    """

    run_id: str
    tags: Mapping[str, str]
    page: str


def whole_run(tracked: StepRun) -> RecordedRun:
    """The run of the whole pipeline that a step belongs to."""
    return _recorded(tracked, tracked.client.get_run(tracked.parent_run_id))


def step_runs(tracked: StepRun) -> dict[str, RecordedRun]:
    """Step -> its latest run, of the pipeline run that `tracked` belongs to."""
    found = tracked.client.search_runs(
        [tracked.experiment_id],
        f"tags.`mlflow.parentRunId` = '{tracked.parent_run_id}'",
        max_results=MOST_STEPS,
        order_by=["attributes.start_time ASC"],
    )
    return {run.data.tags["ncsn.step"]: _recorded(tracked, run) for run in found if "ncsn.step" in run.data.tags}


def job_metadata(tracked: StepRun, *, run: str, step: str) -> dict[str, str]:
    """What a Ray job says of itself in Ray's own pages: which step it is, and its runs in MLflow and KFP."""
    recorded = _recorded(tracked, tracked.client.get_run(tracked.run_id))
    names = {"ncsn.run": run, "ncsn.step": step, "mlflow.run_id": tracked.run_id}
    return names | {"mlflow.run": recorded.page or shown(tracked.uri)} | kfp_run()


def _recorded(tracked: StepRun, run: Run) -> RecordedRun:
    return RecordedRun(
        run_id=run.info.run_id,
        tags=dict(run.data.tags),
        page=page(tracked.uri, run.info.experiment_id, run.info.run_id),
    )
