"""The training loop of one worker: score matching over the noise levels.

The loop knows its worker context and nothing of Ray. Everything random is a function of (seed, place in the image
order), so the images of a global batch, their levels and their noise do not depend on how many workers share it.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ncsn import storage
from ncsn.config import Config
from ncsn.core.images import DataMoments
from ncsn.core.training import train_step
from ncsn.data.format import load_manifest
from ncsn.data.training_images import open_training_images
from ncsn.distributed.faults import Rehearsal
from ncsn.errors import UserError
from ncsn.model import build, checkpoint
from ncsn.process import keep_freed_memory
from ncsn.runs.records import PREVIEW, load_history, now_ms
from ncsn.storage.heartbeat import Lease, LeaseExpired
from ncsn.training.batches import draw_batch, image_moments
from ncsn.training.context import WorkerContext
from ncsn.training.metrics import Curves, LiveSink, MachineUsage, preview_png


class Cadence:
    """Is due about every few seconds, on all workers at the same step.

    What all workers must do together cannot wait for each one's own clock, and a fixed number of steps is too often for
    a small network and too seldom for a large one. So the workers agree, each time, on the steps to the next.

    Args:
        context: The workers.
        seconds: Time between two times that it is due.
    """

    def __init__(self, context: WorkerContext, *, seconds: float) -> None:
        self._context, self._seconds = context, seconds
        self._steps = self._left = 1
        self._since = time.perf_counter()

    def due(self) -> bool:
        """Count a step; whether it is time. A collective call when it is."""
        self._left -= 1
        if self._left:
            return False
        now = time.perf_counter()
        mean = torch.tensor([(now - self._since) / self._steps], device=self._context.device)
        step_seconds = float(self._context.sum_over_workers(mean)) / self._context.world_size
        # At most twice as far as before: the first steps of a training are not like the others.
        self._steps = self._left = max(1, min(2 * self._steps, round(self._seconds / max(step_seconds, 1e-9))))
        self._since = now
        return True


def compile_network(network: nn.Module, context: WorkerContext) -> None:
    """Compile the network's forward and backward pass in place; its class and the names of its tensors stay.

    A collective call.

    Raises:
        UserError: on every worker alike, if the machine of one has no compiler.
    """
    on_cpu = context.device.type == "cpu"
    compilers = [os.environ.get("CXX", "g++"), "clang++"] if on_cpu else ["cc", "gcc", "clang"]
    lacks = torch.tensor([float(not any(map(shutil.which, compilers)))], device=context.device)
    if context.sum_over_workers(lacks) > 0:
        raise UserError(
            "compute.compile",
            f"needs a compiler on each worker, one of {', '.join(compilers)}",
            hint="install one, or set it to false",
            value=True,
        )
    network.compile()


class DivergedError(UserError):
    """Training diverged: a loss or a gradient is not finite."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything a worker needs to know; picklable.

    Attributes:
        config: The experiment.
        dataset: URI of the ingested data set.
        sink: Where rank 0 sends the curves, or None.
        progress: Called on rank 0 with (images_seen, num_images), or None.
        history: URI of the file in which rank 0 keeps the curves, or None.
        preview: Images seen -> URI of the file in which rank 0 keeps the preview, or None.
        start: URI of a checkpoint to start from while the run has none of its own, or None.
        lease: Read on rank 0 at each report: training ends when its launcher is gone; or None.
        rehearsal: Faults to let happen.
        stop_at: End here, in images seen, though the schedules go on to `train.num_images`; None = at their end.
    """

    config: Config
    dataset: str
    sink: LiveSink | None = None
    progress: Callable[[int, int], None] | None = None
    history: str | None = None
    preview: Callable[[int], str] | None = None
    start: str | None = None
    lease: Lease | None = None
    rehearsal: Rehearsal = field(default_factory=Rehearsal)
    stop_at: int | None = None

    @property
    def last_image(self) -> int:
        """Images seen at which training ends."""
        return min(self.stop_at or self.config.train.num_images, self.config.train.num_images)


@dataclass(frozen=True)
class TrainOutcome:
    """What training leaves behind.

    Attributes:
        images_seen: Training images consumed by all workers.
        loss: Mean normalised loss since the last report (a zero network reads 1); None if nothing was left to do.
        images_per_second: Over this call, without start-up.
        seconds: Duration of this call.
        checkpoint: Name of the last checkpoint folder.
        notes: What a person should know.
        pauses: Seconds that training stood still for each checkpoint on this worker.
    """

    images_seen: int
    loss: float | None
    images_per_second: float
    seconds: float
    checkpoint: str
    notes: tuple[str, ...] = ()
    pauses: tuple[float, ...] = ()


class Training:
    """State of one worker and the three things it does: step, report, save."""

    def __init__(self, job: TrainingJob, context: WorkerContext) -> None:
        self.job, self.config, self.context = job, job.config, context
        self.sigmas = build.sigmas(self.config).to(context.device)
        self.loss = build.loss(self.config)
        self.options = build.step_options(self.config, device=context.device, world_size=context.world_size)
        self.curves = Curves(self.config.levels.num_levels, context)
        self.saved, self.pauses = "", list[float]()
        with context.mistakes_shared():  # a full disk, say, may stand in the way on one node alone
            self.split = open_training_images(job.dataset, self.config.data)
            self.dataset_digest = load_manifest(job.dataset).digest
            self.state = build.train_state(self.config, device=context.device)
            self._resume()
            kept = job.history if context.rank == 0 else None
            self.history = load_history(kept, until=self.state.images_seen) if kept else None
        if self.config.compute.compile:
            compile_network(self.state.network, context)
        self.model = context.wrap(self.state.network)
        self.cadence, self.warned = Cadence(context, seconds=5.0), False
        self.usage = MachineUsage(context.device)
        self.point: dict[str, float] = {}
        self.reported = 0

    def _resume(self) -> None:
        """Go on from the latest checkpoint, if there is one."""
        with self._latest_checkpoint() as folder:
            if folder is None:
                return
            digest = self.dataset_digest
            curves = checkpoint.load(folder, config=self.config, state=self.state, dataset_digest=digest)
        if curves is not None:
            self.curves.go_on_from(curves)
        self.saved = checkpoint.folder_name(self.state.images_seen)

    @contextmanager
    def _latest_checkpoint(self) -> Iterator[Path | None]:
        with self.context.latest_checkpoint() as folder:
            if folder is not None or self.job.start is None:
                yield folder
                return
        with storage.local_copy(self.job.start) as folder:
            yield folder

    @cached_property
    def moments(self) -> DataMoments:
        """See `image_moments`."""
        return image_moments(self.config, self.split)

    def step(self) -> None:
        """One optimizer step on the next global batch."""
        config, context, state = self.config, self.context, self.state
        share = context.share(config.train.batch_size)
        due = range(state.images_seen, state.images_seen + config.train.batch_size)
        rehearsal = self.job.rehearsal
        rehearsal.strike(due, share=share, rank=context.rank, network=state.network, saved=self.saved)
        drawn = draw_batch(config, self.split, first=state.images_seen + share.start, count=len(share))
        batch = drawn.to(context.device, memory_format=build.memory_format(config))
        for group in state.optimizer.param_groups:
            group["lr"] = build.learning_rate(config, state.images_seen)
        report = train_step(self.model, batch, state=state, loss=self.loss, sigmas=self.sigmas, options=self.options)
        state.images_seen += config.train.batch_size
        self.curves.add(batch.level, report, images=config.train.batch_size)

    def report(self) -> None:
        """Close a stretch of the curves; stop if training has diverged. A collective call."""
        point, images_seen = self.curves.take(), self.state.images_seen
        if not (math.isfinite(point["train/loss"]) and math.isfinite(point["train/grad_norm_max"])):
            kept = f"the last good checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"
            raise DivergedError(
                "optimizer.learning_rate",
                f"training diverged: loss {point['train/loss']}, gradient norm {point['train/grad_norm_max']} by "
                f"images_seen = {images_seen}; {kept}",
                hint="lower it or set optimizer.grad_clip_norm",
                value=self.config.optimizer.learning_rate,
            )
        self.point = point | {"train/learning_rate": build.learning_rate(self.config, images_seen)}
        self.reported = now_ms()
        system = self.usage.read() if self.context.rank == 0 else {}
        if self.context.rank == 0 and self.job.sink:
            self.job.sink.log(system | self.point, images_seen, self.reported)
        if self.history is not None:
            self.history.add(self.point, images_seen, system=system, when=self.reported)

    def abandoned(self) -> bool:
        """Whether the launcher is gone, the same on every worker. A collective call."""
        if self.job.lease is None:
            return False
        expired = self.context.rank == 0 and self.job.lease.expired()
        return bool(self.context.sum_over_workers(torch.tensor([float(expired)], device=self.context.device)))

    def save(self) -> None:
        """Publish a checkpoint. A collective call."""
        began = time.perf_counter()
        if self.context.rank == 0 and self.job.sink:
            self._preview(self.job.sink)
        self._publish(loss=self.curves.take_checkpoint_loss())
        self.pauses.append(time.perf_counter() - began)

    def _preview(self, sink: LiveSink) -> None:
        """Show a few images from the present weights, if there is time for them."""
        png = preview_png(config=self.config, state=self.state, moments=self.moments)
        if png is None:
            return
        if self.job.preview is not None:
            storage.write_bytes(self.job.preview(self.state.images_seen), png)
        sink.log_picture(png, PREVIEW, self.state.images_seen, self.reported)

    def save_in_time(self) -> None:
        """Publish a checkpoint, once, if a machine is about to be taken away. A collective call.

        The curves' sums are saved too, so that what is reported later does not show it. Nothing that is not finite is.
        """
        if self.warned or not self.context.preempted():
            return
        self.warned = True
        curves = self.curves.unreported()
        if math.isfinite(curves["grad_norm"] + sum(map(sum, curves["sums"]))):
            self._publish(loss=None, curves=curves)

    def _publish(self, *, loss: float | None, curves: dict[str, Any] | None = None) -> None:
        self.saved, write = checkpoint.folder_name(self.state.images_seen), None
        if self.context.rank == 0:
            if self.history is not None:
                self.history.publish()
            write = self._writer(curves)
        self.context.publish(write, name=self.saved, loss=loss)

    def _writer(self, curves: dict[str, Any] | None) -> Callable[[Path], None]:
        """What writes the present state into a folder, now or when training has gone on."""
        snapshot = checkpoint.snapshot(
            config=self.config,
            state=self.state,
            moments=self.moments,
            dataset_digest=self.dataset_digest,
            curves=curves,
        )

        def write(folder: Path) -> None:
            self.job.rehearsal.fill_disk(folder)
            snapshot.write(folder)

        return write


def train_loop(job: TrainingJob, context: WorkerContext) -> TrainOutcome:
    """Train from the latest checkpoint to the job's last image, rounded up to whole batches.

    Raises:
        DivergedError: if the loss or a gradient is not finite; on every worker alike, and nothing is saved.
        CheckpointError: if the checkpoint to resume from is damaged or of another config.
        LeaseExpired: if the launcher is gone; the state is saved.
    """
    train = job.config.train
    torch.set_num_threads(job.config.compute.cpus_per_worker)
    keep_freed_memory()
    training = Training(job, context)
    started, first = time.perf_counter(), training.state.images_seen
    try:
        while training.state.images_seen < job.last_image:
            training.step()
            seen = training.state.images_seen
            save = seen >= job.last_image or _crossed(seen, train.batch_size, train.checkpoint_every_images)
            if save or _crossed(seen, train.batch_size, train.report_every_images):
                training.report()
                abandoned = seen < job.last_image and training.abandoned()
                if save or abandoned:
                    training.save()
                if abandoned:
                    raise LeaseExpired(f"the launcher is gone: stopped at images_seen = {seen}, saved {training.saved}")
            if not save and training.cadence.due():
                training.save_in_time()
            if context.rank == 0 and job.progress:
                job.progress(seen, job.last_image)
    except Exception:
        # MLflow may not have the last points yet, and training may not reach them again.
        if training.history is not None:
            with suppress(OSError):
                training.history.publish()
        raise
    finally:
        if context.rank == 0 and job.sink:
            job.sink.close()
    seconds = time.perf_counter() - started
    return TrainOutcome(
        images_seen=training.state.images_seen,
        loss=training.point.get("train/loss"),
        images_per_second=(training.state.images_seen - first) / max(seconds, 1e-9),
        seconds=seconds,
        checkpoint=training.saved,
        pauses=tuple(training.pauses),
    )


def _crossed(images_seen: int, batch_size: int, every: int) -> bool:
    """Whether the last batch reached or passed a multiple of `every`."""
    return images_seen // every > (images_seen - batch_size) // every
