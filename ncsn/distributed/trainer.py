"""Ray Train around the training loop."""

from __future__ import annotations

from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ncsn import storage
from ncsn.distributed.local_cluster import require_resources
from ncsn.distributed.ray_context import RayContext
from ncsn.distributed.worker_loop import TrainingJob, TrainOutcome, train_loop
from ncsn.lease import LeaseExpired

CHECKPOINTS = "checkpoints"
STARTUP_ATTEMPTS = 5


def train(job: TrainingJob, *, run_uri: str) -> TrainOutcome:
    """Train on the connected Ray cluster; the same `run_uri` resumes from its latest checkpoint.

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
    compute = job.config.compute
    filesystem, path = storage.filesystem(run_uri)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
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
    if isinstance(outcome, (ValueError, LeaseExpired)):
        raise outcome
    assert isinstance(outcome, TrainOutcome)
    return outcome


def _worker(arguments: dict[str, Any]) -> TrainOutcome | ValueError | LeaseExpired:
    """Ray retries what a worker raises; a mistake that would only repeat, and an order to end, is returned instead."""
    try:
        return train_loop(arguments["job"], RayContext())
    except (ValueError, LeaseExpired) as end:
        return end
