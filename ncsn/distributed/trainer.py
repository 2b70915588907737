"""Ray Train, or one Ray task, around the training loop.

Checkpoints go to the store in the background, while training goes on: Ray Train calls the upload from a thread, waits
for it before a worker is done, and restarts the group if it fails.

Ray Train starts half a dozen processes around its workers, 15 CPU seconds or more each time. That is nothing for a
training, and most of a short trial of a search. One worker needs none of them: the loop is the same, the weights are
the same to the last bit, and a lost task is started again and resumes from the checkpoints in the store.
"""

from __future__ import annotations

import inspect
import logging
import math
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.exceptions import RayActorError
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ncsn import storage
from ncsn.data.format import load_manifest
from ncsn.distributed.cluster import require_resources
from ncsn.distributed.tasks import call
from ncsn.errors import NotFound
from ncsn.model import checkpoint
from ncsn.model.checkpoint import DamagedError
from ncsn.model.checkpoint_store import CHECKPOINTS, SNAPSHOT, BestCheckpoint, newest_whole
from ncsn.model.damaged_checkpoint import remedy
from ncsn.storage.heartbeat import LeaseExpired
from ncsn.storage.retry import limited
from ncsn.training.context import LocalContext, WorkerContext
from ncsn.training.loop import TrainingJob, TrainOutcome, train_loop

# All buffers are constants. Torch 2.13 renamed the argument that says so.
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


class RayContext(WorkerContext):
    """A worker of a Ray `TorchTrainer`: gloo on CPUs, NCCL on GPUs.

    Args:
        checkpoints: URI of the folder that Ray Train keeps its checkpoints in.
        best: What keeps the best checkpoint, or None.
    """

    def __init__(self, checkpoints: str, *, best: BestCheckpoint | None = None) -> None:
        context = ray.train.get_context()
        self.uri, self._best, self._storing = checkpoints, best, threading.Lock()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.rank == 0 and storage.is_local(checkpoints):
            storage.remove_scratch(checkpoints)

    @contextmanager
    def mistakes_shared(self) -> Iterator[None]:
        """Every worker tells the others how it fared; of several mistakes that of the lowest rank is raised."""
        own: ValueError | None = None
        try:
            yield
        except ValueError as mistake:
            own = mistake
        told = [own] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(told, own)
        for each in told:
            if each is not None:
                raise each

    def preempted(self) -> bool:
        """Whether Ray is draining a node that hosts a worker, as autoscalers and `ray drain-node` do before its end."""
        return ray.train.get_preemption_info() is not None

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network under DistributedDataParallel, if there is more than one worker."""
        if self.world_size == 1:
            return network
        # For 1x1 convolutions two kinds of strides name one layout in memory, so what this warns of does not happen.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return DistributedDataParallel(network, gradient_as_bucket_view=True, **_NO_BUFFER_SYNC)

    def sum_over_workers(self, tensor: Tensor) -> Tensor:
        """All-reduce."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """The latest checkpoint that Ray Train has registered in the run's storage."""
        latest = ray.train.get_checkpoint()
        if latest is None:
            yield None
            return
        with latest.as_directory() as folder:
            yield Path(folder)

    def publish(self, write: Callable[[Path], None] | None, *, name: str, loss: float | None) -> None:
        """Begin to write and store; Ray Train registers the checkpoint once it is complete.

        Waits if the checkpoint before is still on its way, so that a slow store does not fill this machine's memory.
        """
        with self._storing:
            pass
        # A folder from which publishing is a move, if the store is a disk.
        folder = storage.new_scratch(self.uri) if write is not None else None

        def store(local: ray.train.Checkpoint, stored_as: str) -> ray.train.Checkpoint:
            assert write is not None
            return self._store(write, Path(local.path), stored_as, loss=loss)

        ray.train.report(
            {} if loss is None else {"loss": loss},
            checkpoint=ray.train.Checkpoint.from_directory(folder) if folder else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,  # `_store` does
            # Ray's own copy has no order among files, and checkpoint_score_attribute keeps the k best but not the k
            # latest.
            checkpoint_upload_fn=store,
        )

    def _store(
        self, write: Callable[[Path], None], folder: Path, name: str, *, loss: float | None
    ) -> ray.train.Checkpoint:
        """Publish; what a lost attempt has published, and Ray Train not registered, is replaced by the same."""
        target = storage.join(self.uri, name)
        with self._storing:
            try:
                write(folder)
                storage.publish_folder(folder, target, marker=checkpoint.INDEX, replace=True)
                if self._best is not None and loss is not None:
                    self._best.offer(Path(target) if storage.is_local(target) else folder, name=name, loss=loss)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        filesystem, path = storage.filesystem(target)
        return ray.train.Checkpoint(path, filesystem)


class StoreContext(LocalContext):
    """A single worker whose checkpoints lie in the store.

    Args:
        uri: Folder that receives the checkpoints; the last whole one by name is resumed from.
        device: Where to compute.
    """

    def __init__(self, uri: str, *, device: str = "cpu") -> None:
        super().__init__(Path(), device=device)
        self.uri = uri

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The last whole folder, by name."""
        return newest_whole(
            [name for name in storage.list_names(self.uri) if storage.exists(self._marker(name))],
            opened=lambda name: storage.local_copy(storage.join(self.uri, name)),
            delete=lambda name: storage.delete_folder(storage.join(self.uri, name)),
        )

    def publish(self, write: Callable[[Path], None] | None, *, name: str, loss: float | None) -> None:  # noqa: ARG002
        """Write and publish; one that a lost attempt has published already stays, for it is the same."""
        assert write is not None
        with storage.scratch_folder(self.uri) as folder:
            write(folder)
            storage.publish_folder(folder, storage.join(self.uri, name), marker=checkpoint.INDEX)

    def _marker(self, name: str) -> str:
        return storage.join(self.uri, name, checkpoint.INDEX)


def train_alone(job: TrainingJob, *, checkpoints: str) -> TrainOutcome:
    """Train with one worker on the connected Ray cluster; the same `checkpoints` resumes from the latest.

    Args:
        job: What to train on what; its `compute.num_workers` is 1.
        checkpoints: URI of the folder of the checkpoints.

    Raises:
        ValueError: for a mistake that a repetition would only repeat, such as a divergence.
        ray.exceptions.RayError: if the worker was lost more often than `compute.max_failures`.
    """
    compute = job.config.compute
    assert compute.num_workers == 1, "several workers are Ray Train's"
    return call(
        _train,
        job,
        checkpoints,
        cpus=compute.cpus_per_worker,
        use_gpu=compute.use_gpu,
        retries=compute.max_failures,
    )


def _train(job: TrainingJob, checkpoints: str) -> TrainOutcome:
    return train_loop(job, StoreContext(checkpoints, device="cuda" if job.config.compute.use_gpu else "cpu"))


_logger = logging.getLogger(__name__)


class LostWorkers(UserCallback):  # type: ignore[misc]
    """Says what happened and where training resumes, unless it does not.

    Args:
        run_uri: Folder of the run.
        max_failures: How often Ray Train starts the workers again.
    """

    def __init__(self, run_uri: str, *, max_failures: int) -> None:
        self._run_uri, self._left = run_uri, max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002 - Ray's
        """Called in the controller before it decides; see `UserCallback`."""
        if not any(getattr(_cause(error), "preempted", False) for error in worker_exceptions.values()):
            self._left -= 1  # Ray Train starts again without end after preemptions
        if self._left >= 0:
            _logger.warning(
                "%s, training resumes from %s", describe(worker_exceptions), _latest_checkpoint(self._run_uri)
            )


def describe(errors: Mapping[int, Exception]) -> str:
    """What befell the workers, by rank: a lost one makes the others fail too, so it goes first."""
    if any(isinstance(_cause(error), RayActorError) for error in errors.values()):
        return "worker lost"
    rank, error = min(errors.items())
    first = next(iter(str(error).strip().splitlines()), "")
    return f"worker {rank} failed with {type(error).__name__}: {first}"


def reason(failure: TrainingFailedError) -> str:
    """Why Ray Train gave up, in one line."""
    if errors := getattr(failure, "worker_failures", None):
        return describe(errors)
    cause = getattr(failure, "controller_failure", failure)
    return f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')}"


def _cause(error: Exception) -> Exception:
    """What is in Ray Train's report of a worker that did not answer."""
    cause: Exception = getattr(error, "health_check_failure", error)
    return cause


def _latest_checkpoint(run_uri: str) -> str:
    try:
        with limited(0):
            latest = storage.read_json(storage.join(run_uri, CHECKPOINTS, SNAPSHOT))["latest_checkpoint_result"]
    except FileNotFoundError:
        latest = None
    except OSError:
        return "its last checkpoint"
    return str(latest["checkpoint_dir_name"]) if latest else "the start"


STARTUP_ATTEMPTS = 5
TIMEOUT_SECONDS = 1800
"""torch's own patience with a collective operation."""
SLOWEST_READ = 5e6
"""Bytes of images per second that a node reads from the slowest store that is worth waiting for."""


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
