"""Ray Train around the training loop, for nodes that come and go and for several GPUs.

Ray Train starts the workers, and starts them again when one is lost. It gets no checkpoints: a new group of workers
finds the newest one in the store, as any other process would. It also starts half a dozen processes around its workers.
"""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import suppress
from typing import Any

import ray.train
import ray.train.torch
from ray.exceptions import OutOfMemoryError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.execution.failure_handling import default

from ncsn.distributed.trainer import End, LostWorkers, attempt, describe, patience
from ncsn.training.context import LONG_SECONDS, WorkerContext
from ncsn.training.loop import TrainingJob, TrainOutcome

STARTUP_ATTEMPTS = 5
STALLED_SECONDS = 600  # of GPUs, Ray's default: rank 0 may wait for a store that is away
ENV_VARS_TO_PROPAGATE.add("GOMP_SPINCOUNT")  # whose workers load torch before `ncsn.distributed`

# One of Ray Train's processes looks for its cluster by itself. Where this machine has several it ends with a traceback.
ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
# Ray Train starts workers again that are lost while they start, but not those that Ray kills for memory meanwhile.
default.RETRYABLE_CONTROLLER_ERRORS += (OutOfMemoryError,)

_logger = logging.getLogger(__name__)


def train_by_ray(job: TrainingJob, *, run_uri: str) -> TrainOutcome:
    """Train on the connected cluster; `RuntimeError` as `ncsn.distributed.train`."""
    compute = job.config.compute
    longest = patience(job)
    if compute.use_gpu:  # Ray asks NCCL's program `ncclras`, where it is, and names the ranks that hang
        os.environ.setdefault("RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR", "1")
        os.environ.setdefault("RAY_TRAIN_NCCL_RAS_ACTION", "fail")
        os.environ.setdefault("RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S", str(STALLED_SECONDS + longest))
    with tempfile.TemporaryDirectory(prefix="ncsn-") as folder:
        trainer = _Trainer(
            lambda arguments: attempt(**arguments),
            torch_config=_Torch(timeout_s=round(LONG_SECONDS + longest)),
            train_loop_config={"job": job, "run_uri": run_uri, "context": RayContext},
            scaling_config=ScalingConfig(
                num_workers=compute.num_workers,
                use_gpu=compute.use_gpu,
                resources_per_worker={"CPU": compute.cpus_per_worker} | ({"GPU": 1} if compute.use_gpu else {}),
            ),
            run_config=RunConfig(
                name=run_uri.rpartition("/")[2],
                storage_path=folder,  # stays empty, since Ray Train gets no checkpoints
                failure_config=FailureConfig(
                    max_failures=compute.max_failures, controller_failure_limit=STARTUP_ATTEMPTS
                ),
                callbacks=[_Lost(run_uri, compute.max_failures)],
                logging_config=LoggingConfig(log_level="ERROR"),  # the files of Ray's session have the rest
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as failure:
            _logger.error("%s", failure)  # noqa: TRY400 - the workers' tracebacks are in its text
            raise RuntimeError(f"{reason(failure)}; compute.max_failures = {compute.max_failures}") from failure
    end: End | None = result.return_value
    assert end is not None
    if isinstance(end, Exception):
        raise end
    return end


class _Lost(LostWorkers, UserCallback):  # type: ignore[misc]
    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002 - Ray's
        """Called in the controller before it decides."""
        self.count(worker_exceptions)


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_shutdown(self, *group: Any) -> None:
        """Called before workers are started again. Ray expects any end of a worker here but by its memory monitor."""
        with suppress(OutOfMemoryError):
            super().on_shutdown(*group)


class _Torch(TorchConfig):  # type: ignore[misc]
    backend_cls = _Backend


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Leaves Ctrl-C to its caller. Ray's answer would end the workers before they can save."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


class RayContext(WorkerContext):
    """A worker of a Ray `TorchTrainer`."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        rank, world_size = context.get_world_rank(), context.get_world_size()
        super().__init__(ray.train.torch.get_device(), rank=rank, world_size=world_size)
        self.spans_nodes = self.device.type == "cuda" and context.get_local_world_size() < self.world_size

    def preempted(self) -> bool:
        """Whether Ray drains a node of a worker, as autoscalers and `ray drain-node` do before its end."""
        return ray.train.get_preemption_info() is not None


def reason(failure: TrainingFailedError) -> str:
    """Why Ray Train gave up, as one line."""
    if errors := getattr(failure, "worker_failures", None):
        return describe(errors)
    cause = getattr(failure, "controller_failure", failure)
    return f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')}"
