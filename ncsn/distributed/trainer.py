"""Ray Train around the training loop."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from operator import itemgetter
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ncsn import storage
from ncsn.checkpoint import DamagedError
from ncsn.distributed.best_checkpoint import BestCheckpoint
from ncsn.distributed.local_cluster import require_resources
from ncsn.distributed.ray_context import RayContext
from ncsn.distributed.worker_context import CHECKPOINTS, SNAPSHOT
from ncsn.distributed.worker_loop import TrainingJob, TrainOutcome, train_loop
from ncsn.lease import LeaseExpired

STARTUP_ATTEMPTS = 5

_logger = logging.getLogger(__name__)


def train(job: TrainingJob, *, run_uri: str) -> TrainOutcome:
    """Train on the connected Ray cluster; the same `run_uri` resumes from its latest whole checkpoint.

    Args:
        job: What to train on what.
        run_uri: Folder of the run; checkpoints go to `checkpoints/` below it.

    Raises:
        ValueError: for a mistake that a retry cannot mend (divergence, a checkpoint of another config, too few CPUs).
        LeaseExpired: if the launcher is gone; the last checkpoint is new.
        KeyboardInterrupt: on Ctrl-C.
        ray.train.TrainingFailedError: if workers were lost more often than `compute.max_failures`.
    """
    require_resources(job.config)
    notes: list[str] = []
    outcome = _fit(job, run_uri)
    while isinstance(outcome, DamagedError) and (note := _forget_latest(run_uri, outcome)):
        _logger.warning(note)
        notes.append(note)
        outcome = _fit(job, run_uri)
    if isinstance(outcome, Exception):
        raise outcome
    return replace(outcome, notes=tuple(notes))


def _fit(job: TrainingJob, run_uri: str) -> TrainOutcome | ValueError | LeaseExpired:
    compute = job.config.compute
    filesystem, path = storage.filesystem(run_uri)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "run_uri": run_uri},
        scaling_config=ScalingConfig(
            num_workers=compute.num_workers,
            use_gpu=compute.use_gpu,
            resources_per_worker={"CPU": compute.cpus_per_worker} | ({"GPU": 1} if compute.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=compute.max_failures, controller_failure_limit=STARTUP_ATTEMPTS),
            checkpoint_config=CheckpointConfig(num_to_keep=job.config.train.keep_checkpoints),
        ),
    )
    try:
        result = trainer.fit()
    except SystemExit as stop:
        if stop.code in (0, 1):  # what Ray makes of Ctrl-C; 0 would read as success
            raise KeyboardInterrupt from None
        raise
    outcome = result.return_value
    assert isinstance(outcome, (TrainOutcome, ValueError, LeaseExpired))
    return outcome


def _forget_latest(run_uri: str, damage: DamagedError) -> str:
    """Take the latest checkpoint off Ray Train's list, so that it resumes from the one before; what to say of it.

    Training comes to the same place again and puts a new one there; with the folder listed twice Ray Train would delete
    the new one with the old.
    """
    uri = storage.join(run_uri, CHECKPOINTS, SNAPSHOT)
    snapshot = json.loads(storage.read_text(uri)) if storage.exists(uri) else {}
    if not snapshot.get("latest_checkpoint_result"):
        return ""
    name = snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]
    listed = zip(snapshot["checkpoint_results"], snapshot["checkpoint_report_indices"], strict=True)
    kept = [(result, index) for result, index in listed if result["checkpoint_dir_name"] != name]
    snapshot["checkpoint_results"] = [result for result, _ in kept]
    snapshot["checkpoint_report_indices"] = [index for _, index in kept]
    before = max(kept, key=itemgetter(1))[0] if kept else None
    snapshot["latest_checkpoint_result"] = before
    storage.write_text(uri, json.dumps(snapshot))
    storage.delete_folder(storage.join(run_uri, CHECKPOINTS, name))
    instead = f"from {before['checkpoint_dir_name']}" if before else "from the start, for there is none before it"
    return f"checkpoint {name} is damaged ({damage.reason}): training went on {instead}"


def _worker(arguments: dict[str, Any]) -> TrainOutcome | ValueError | LeaseExpired:
    """Ray retries what a worker raises; a mistake that would only repeat, and an order to end, is returned instead."""
    job, run_uri = arguments["job"], arguments["run_uri"]
    try:
        best = BestCheckpoint(run_uri) if job.config.train.keep_best else None
        return train_loop(job, RayContext(storage.join(run_uri, CHECKPOINTS), best=best))
    except (ValueError, LeaseExpired) as end:
        return end
