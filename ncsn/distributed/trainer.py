"""Ray Train around the training loop."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from ncsn import storage
from ncsn.data.format import load_manifest
from ncsn.distributed.local_cluster import require_resources
from ncsn.distributed.lost_workers import LostWorkers, reason
from ncsn.distributed.ray_context import RayContext
from ncsn.errors import NotFound
from ncsn.model.checkpoint import DamagedError
from ncsn.model.checkpoint_store import CHECKPOINTS, BestCheckpoint
from ncsn.model.damaged_checkpoint import remedy
from ncsn.storage.heartbeat import LeaseExpired
from ncsn.training.loop import TrainingJob, TrainOutcome, train_loop

STARTUP_ATTEMPTS = 5
TIMEOUT_SECONDS = 1800
"""torch's own patience with a collective operation."""
SLOWEST_READ = 5e6
"""Bytes of images per second that a node reads from the slowest store that is worth waiting for."""

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
        RuntimeError: if workers failed more often than `compute.max_failures`, or could not be started.
    """
    require_resources(job.config)
    notes: list[str] = []
    outcome = _fit(job, run_uri)
    while isinstance(outcome, DamagedError) and (note := remedy(run_uri, outcome)) and note not in notes:
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
        torch_config=TorchConfig(timeout_s=_patience(job.dataset)),
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
            callbacks=[LostWorkers(run_uri, max_failures=compute.max_failures)],
            # Its session's files keep all that it says.
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        result = trainer.fit()
    except SystemExit as stop:
        if stop.code in (0, 1):  # what Ray makes of Ctrl-C; 0 would read as success
            raise KeyboardInterrupt from None
        raise
    except TrainingFailedError as failure:
        _logger.error("%s", failure)  # noqa: TRY400 - the workers' tracebacks are in its text
        raise RuntimeError(f"{reason(failure)}; compute.max_failures = {compute.max_failures}") from failure
    outcome = result.return_value
    assert isinstance(outcome, (TrainOutcome, ValueError, LeaseExpired))
    return outcome


def _patience(dataset: str) -> int:
    """Seconds for which a worker waits for the others, the first of which may have to fill its node's cache."""
    manifest = load_manifest(dataset)
    size = sum(manifest.counts.values()) * math.prod(manifest.shape)
    return round(TIMEOUT_SECONDS + size / SLOWEST_READ)


def _worker(arguments: dict[str, Any]) -> TrainOutcome | ValueError | LeaseExpired:
    """Ray retries what a worker raises; a mistake that would only repeat, and an order to end, is returned instead."""
    job, run_uri = arguments["job"], arguments["run_uri"]
    try:
        best = BestCheckpoint(run_uri) if job.config.train.keep_best else None
        return train_loop(job, RayContext(storage.join(run_uri, CHECKPOINTS), best=best))
    except NotFound:  # another node may have it
        raise
    except (ValueError, LeaseExpired) as end:
        return end
