"""Ray Train around the training loop, or one Ray task for a single worker of this machine.

Ray Train starts the workers, and starts them again when one is lost. It gets no checkpoints: a new group of workers
finds the newest one in the store, as any other process would. It also starts half a dozen processes around its workers,
15 CPU seconds or more each time, which is much for a short training. One worker needs none of them: loop, weights and
resume are the same to the last bit.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.train import (
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ncsn import storage
from ncsn.config import Config
from ncsn.data.format import load_manifest
from ncsn.data.training_images import WINDOW_BYTES
from ncsn.distributed.cluster import on_this_machine, require_resources
from ncsn.distributed.ray_calls import ANYWHERE
from ncsn.errors import InvalidValue, NotFound
from ncsn.model.checkpoint import DamagedError
from ncsn.model.checkpoint_store import CHECKPOINTS, NEWEST, CheckpointStore
from ncsn.storage.heartbeat import LeaseExpired
from ncsn.storage.retry import RETRY, limited
from ncsn.training.context import WorkerContext
from ncsn.training.loop import TrainingJob, TrainOutcome, train_loop
from ncsn.training.watchdog import LONG_SECONDS

STARTUP_ATTEMPTS = 5
STALLED_SECONDS = 600  # of GPUs, Ray's default: rank 0 may wait for a store that is away
HUNG = "hung"  # folder of a run with the stacks of workers that hung
SLOWEST_READ = 5e6  # bytes of images per second that a node reads from a slow store

# All buffers are constants. Torch 2.13 renamed the argument that says so.
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}

_TRANSIENT = (NotFound, DamagedError)  # another node may have it; a copy may be torn on its way to this one

# One of Ray Train's processes looks for its cluster by itself. Where this machine has several it ends with a traceback.
ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")

_logger = logging.getLogger(__name__)


def train(job: TrainingJob, *, run_uri: str) -> TrainOutcome:
    """Train on the connected Ray cluster; the same `run_uri` resumes from its newest whole checkpoint.

    `RuntimeError` if workers failed more often than `compute.max_failures`, or could not be started.
    """
    require_resources(job.config)
    compute = job.config.compute
    if compute.num_workers == 1 and on_this_machine():  # which is not preempted
        return train_alone(job, run_uri=run_uri)
    manifest = load_manifest(job.dataset)
    # A worker waits for the others, of which one may fill its node's cache first.
    filling = sum(min(count * manifest.pixels.num_bytes, WINDOW_BYTES) for count in manifest.counts.values())
    patience = filling / SLOWEST_READ
    if compute.use_gpu:  # Ray asks NCCL's program `ncclras`, where it is, and names the ranks that hang
        os.environ.setdefault("RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR", "1")
        os.environ.setdefault("RAY_TRAIN_NCCL_RAS_ACTION", "fail")
        os.environ.setdefault("RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S", str(STALLED_SECONDS + patience))
    with tempfile.TemporaryDirectory(prefix="ncsn-") as folder:
        trainer = _Trainer(
            _attempt,
            torch_config=TorchConfig(timeout_s=round(LONG_SECONDS + patience)),
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
                callbacks=[LostWorkers(run_uri, max_failures=compute.max_failures)],
                logging_config=LoggingConfig(log_level="ERROR"),  # the files of Ray's session have the rest
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as failure:
            _logger.error("%s", failure)  # noqa: TRY400 - the workers' tracebacks are in its text
            raise RuntimeError(f"{reason(failure)}; compute.max_failures = {compute.max_failures}") from failure
    outcome: TrainOutcome | InvalidValue | LeaseExpired | None = result.return_value
    assert outcome is not None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Leaves Ctrl-C to its caller. Ray's answer would end the workers before they can save."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def train_alone(job: TrainingJob, *, run_uri: str) -> TrainOutcome:
    """The same with one worker, in a Ray task, which is not told of preemptions."""
    compute = job.config.compute
    assert compute.num_workers == 1, "several workers are Ray Train's"
    task: Any = ray.remote(
        num_cpus=compute.cpus_per_worker,
        num_gpus=int(compute.use_gpu),
        max_calls=int(compute.use_gpu),  # its process would keep a CUDA context on the GPU
        max_retries=0,  # here, with a word
        **ANYWHERE,
    )(_attempt)
    arguments = {"job": job, "run_uri": run_uri, "context": partial(WorkerContext, compute.device)}
    lost = LostWorkers(run_uri, max_failures=compute.max_failures)
    while True:
        try:
            outcome: TrainOutcome | InvalidValue | LeaseExpired = ray.get(task.remote(arguments))
        except RayError as error:
            lost.after_exception(None, {0: error})
            if lost.left < 0:
                raise RuntimeError(f"{describe({0: error})}; compute.max_failures = {compute.max_failures}") from error
        else:
            break
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _attempt(arguments: dict[str, Any]) -> TrainOutcome | InvalidValue | LeaseExpired:
    # What a worker raises is retried, so a mistake that would only repeat, and an order to end, is returned.
    try:
        job: TrainingJob = arguments["job"]
        context: WorkerContext = arguments["context"]()
        context.hung = storage.join(arguments["run_uri"], HUNG)
        return train_loop(job, context, checkpoint_store(job.config, arguments["run_uri"]))
    except _TRANSIENT:
        raise
    except (InvalidValue, LeaseExpired) as end:
        return end


def checkpoint_store(config: Config, run_uri: str) -> CheckpointStore:
    """The checkpoints of a run, of which as many stay as the config says."""
    uri, keep = storage.join(run_uri, CHECKPOINTS), config.train.keep_checkpoints
    return CheckpointStore(uri, keep=NEWEST, thin_every=1) if keep == "all" else CheckpointStore(uri, keep=keep)


class RayContext(WorkerContext):
    """A worker of a Ray `TorchTrainer`: gloo on CPUs, NCCL on GPUs."""

    compresses = False  # gradients, which go from GPUs of one node to those of another

    def __init__(self) -> None:
        super().__init__(ray.train.torch.get_device())
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.compresses = self.device.type == "cuda" and context.get_local_world_size() < self.world_size

    @contextmanager
    def mistakes_shared(self) -> Iterator[None]:
        """Context manager: of several workers' errors that of the lowest rank is raised."""
        own: InvalidValue | None = None
        try:
            yield
        except InvalidValue as mistake:
            own = mistake
        mistakes = [own] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(mistakes, own)
        for each in mistakes:
            if each is not None:
                raise each

    def preempted(self) -> bool:
        """Whether Ray drains a node of a worker, as autoscalers and `ray drain-node` do before its end."""
        return ray.train.get_preemption_info() is not None

    def wrap(self, network: nn.Module, *, dtype: torch.dtype | None) -> nn.Module:
        """The network under DistributedDataParallel, if there is more than one worker.

        Between nodes the gradients of a network that computes in bfloat16 travel in it, in half the bytes.
        """
        if self.world_size == 1:
            return network
        # For 1x1 convolutions two kinds of strides name one layout in memory, so no copy is made.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True, **_NO_BUFFER_SYNC)
        if self.compresses and dtype is torch.bfloat16:
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def sum_over_workers(self, tensor: Tensor) -> Tensor:
        """All-reduce."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


class LostWorkers(UserCallback):  # type: ignore[misc]
    """Logs what failed and where training resumes, as long as Ray Train starts the workers again."""

    def __init__(self, run_uri: str, *, max_failures: int) -> None:
        self._run_uri, self.left = run_uri, max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002 - Ray's
        """Called in the controller before it decides; see `UserCallback`."""
        if not any(getattr(_cause(error), "preempted", False) for error in worker_exceptions.values()):
            self.left -= 1  # Ray Train does not count preemptions
        if self.left >= 0:
            _logger.warning(
                "%s%s, training resumes from %s", RETRY, describe(worker_exceptions), _newest_checkpoint(self._run_uri)
            )


def describe(errors: Mapping[int, Exception]) -> str:
    """Why the workers of these ranks failed. A lost one makes the others fail too, so it goes first."""
    if any(isinstance(_cause(error), (RayActorError, WorkerCrashedError)) for error in errors.values()):
        return "worker lost"
    rank, error = min((rank, _cause(error)) for rank, error in errors.items())
    first = next(iter(str(error).strip().splitlines()), "")
    return f"worker {rank} failed with {type(error).__name__}: {first}"


def reason(failure: TrainingFailedError) -> str:
    """Why Ray Train gave up, as one line."""
    if errors := getattr(failure, "worker_failures", None):
        return describe(errors)
    cause = getattr(failure, "controller_failure", failure)
    return f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')}"


def _cause(error: Exception) -> Exception:
    # A worker that does not answer is reported inside a failed health check, and a task's error inside Ray's.
    cause: Exception = error.cause if isinstance(error, RayTaskError) else getattr(error, "health_check_failure", error)
    return cause


def _newest_checkpoint(run_uri: str) -> str:
    try:
        with limited(0):
            return next(CheckpointStore(storage.join(run_uri, CHECKPOINTS)).resumable(), "the start")
    except OSError:
        return "its last checkpoint"
