"""The training loop of one worker: score matching at many noise levels.

The loop knows its worker context and nothing of Ray. Everything random is a function of (seed, place in the image
order), so the images of a global batch, their levels and their noise do not depend on the number of workers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch

from ncsn import storage
from ncsn.clock import now_ms
from ncsn.config import Config, decay_begins
from ncsn.core.training import train_step
from ncsn.data.format import load_manifest
from ncsn.data.training_images import open_training_images
from ncsn.errors import UserError
from ncsn.model import build, checkpoint
from ncsn.model.checkpoint import CheckpointStore
from ncsn.model.objective import objective_of
from ncsn.progress import Progress
from ncsn.runs.history import load_history
from ncsn.runs.layout import BEFORE_DECAY, RESUME, folder_name, images_seen_at
from ncsn.storage.heartbeat import Lease, LeaseExpired
from ncsn.storage.retry import limited
from ncsn.training.batches import DrawnBatch, classes_of, draw_batch, image_moments
from ncsn.training.context import LONG_SECONDS, StepTimer, Watchdog, WorkerContext, prepare_network
from ncsn.training.held_out import open_probe
from ncsn.training.monitor import Curves, LiveSink, machine_usage, preview_png

CHECK_SECONDS = 2.0  # until training sees that it is to end: the workers wait for that for a hundredth of the time
RESUME_SECONDS = 300.0  # of training that a lost machine may cost; a copy of the state so seldom costs next to nothing

_logger = logging.getLogger(__name__)


class DivergedError(UserError):
    """Training diverged: a loss or a gradient is not finite."""


@dataclass(frozen=True)
class TrainingJob:
    """The input of the loop; picklable."""

    config: Config
    dataset: str  # URI
    sink: LiveSink | None = None  # for the curves and pictures of rank 0
    progress: Progress = field(default_factory=Progress)  # counts the images that all workers have seen
    history: str | None = None  # URI of the file of rank 0's curves
    preview: Callable[[int], str] | None = None  # images seen -> URI of the file of rank 0's preview
    lease: Lease | None = None  # of the launcher, without which training saves and ends
    stop: str | None = None  # URI of an object: once it exists, training saves and ends
    start: str | None = None  # URI of the files of the trained network that `train.init_from` names
    state: str | None = None  # URI of the checkpoint that `train.continue_from` means, if the run has none of its own
    stop_at: int | None = None  # images seen; the schedules go on to `train.num_images`


@dataclass(frozen=True)
class TrainOutcome:
    """The result of the loop."""

    images_seen: int  # by all workers
    loss: float | None  # normalized, of the last point (a zero network reads 1); None if nothing was left to do
    images_per_second: float  # in this call, without startup
    seconds: float
    checkpoint: str  # name of the last one
    computed: str = ""  # on what and how, for people
    notes: tuple[str, ...] = ()  # for people
    pauses: tuple[float, ...] = ()  # seconds that each checkpoint stopped training on this worker


class Training:
    """The state of one worker, which steps, reports and saves."""

    def __init__(self, job: TrainingJob, context: WorkerContext, checkpoints: CheckpointStore) -> None:
        self.job, self.config, self.context, self.checkpoints = job, job.config, context, checkpoints
        self.objective = objective_of(self.config)
        self.options = build.step_options(self.config, world_size=context.world_size)
        self.sink = job.sink if context.rank == 0 else None
        self.last_image = min(job.stop_at or self.config.train.num_images, self.config.train.num_images)
        self.saved, self.saved_at, self.pauses = "", time.perf_counter(), list[float]()
        newest = self._newest_checkpoint()
        with context.mistakes_shared():  # a file may be missing or damaged on one node alone
            self.split = open_training_images(job.dataset)
            self.manifest = load_manifest(job.dataset)
            self.classes = classes_of(self.config, self.manifest)
            recorded = job.sink is not None or job.history is not None
            self.probe = open_probe(job.config, self.objective, job.dataset, self.split, context) if recorded else None
            self.state = build.train_state(self.config, device=context.device)
            taught = None
            if self.config.loss.has_teacher:
                from ncsn.model.trained import teacher

                assert job.start is not None, "the config's rules"
                taught = teacher(job.start, config=self.config, classes=self.classes, device=context.device)
            self.loss = self.objective.loss(self.state.uncertainty, taught)
            digest = self.manifest.digest
            if newest is not None:
                with self.checkpoints.open(newest) as folder:
                    checkpoint.restore(folder, config=self.config, state=self.state, dataset_digest=digest)
                self.saved = newest
            elif job.state is not None:
                with storage.local_copy(job.state) as folder:
                    checkpoint.restore(folder, config=None, state=self.state, dataset_digest=digest)
            elif job.start is not None:
                from ncsn.model.trained import start_from

                start_from(job.start, state=self.state, config=self.config, classes=self.classes)
            kept = job.history if context.rank == 0 else None
            self.history = load_history(kept, until=self.state.images_seen) if kept else None
        self.model, self.computed = prepare_network(self.state.network, self.config, context, teacher=taught)
        if self.history is not None:
            _logger.warning("training on %s", self.computed)
        self.ahead = ThreadPoolExecutor(2)  # of the moments, and of the next batch
        if context.rank == 0:
            self.moments = self.ahead.submit(image_moments, self.config, job.dataset, self.split)
        self.coming: Future[DrawnBatch] | None = None
        self.timer = StepTimer(context, seconds=CHECK_SECONDS / 4)  # steps may become slower
        self.checked_at = 0.0
        self.warned = False  # of the loss of a machine: one checkpoint is enough
        machine_usage(context.device)  # starts the first interval
        self.last_loss: float | None = None
        self.reported, self.reported_at = 0, self.state.images_seen  # by the clock, and in images
        # Last, since their clocks run.
        self.curves = Curves(self.objective, context)
        self.watchdog = Watchdog(context)

    def ended(self) -> bool:
        """Whether no batch is to follow."""
        return self.state.images_seen >= self.last_image

    def crossed(self, every: int) -> bool:
        """Whether the last batch reached or passed a multiple of `every` images."""
        seen = self.state.images_seen
        return seen // every > (seen - self.config.train.batch_size) // every

    def _newest_checkpoint(self) -> str | None:
        """Name of the checkpoint to resume from, which rank 0 finds. A collective call."""
        context, found = self.context, [0, 0]
        with context.mistakes_shared():
            if context.rank == 0 and (newest := self.checkpoints.newest()) is not None:
                found = [1 + images_seen_at(newest), newest.startswith(RESUME)]
        shared, resume = context.sum_over_workers(torch.tensor(found, device=context.device)).tolist()
        return folder_name(shared - 1, RESUME if resume else "images-") if shared else None

    def step(self) -> None:
        """One optimizer step on the next global batch."""
        config, context, state = self.config, self.context, self.state
        # This worker's share of the next batch, which was drawn while the one before was computed.
        share, size = context.share(config.train.batch_size), config.train.batch_size
        first, draw = state.images_seen + share.start, partial(draw_batch, config, self.objective, self.split)
        drawn = draw(first=first, count=len(share)) if self.coming is None else self.coming.result()
        if state.images_seen + size < self.last_image:
            self.coming = self.ahead.submit(draw, first=first + size, count=len(share))
        batch = drawn.on(context.device, config)
        for group in state.optimizer.param_groups:
            group["lr"] = build.learning_rate(config, state.images_seen, peak=group["initial_lr"])
        losses, grad_norm = train_step(
            self.model, batch, state=state, loss=self.loss, options=self.options, average=context.average
        )
        state.images_seen += size
        self.curves.add(batch, losses, grad_norm, images=size)

    def report(self, *, measured: bool = False) -> None:
        """Add a point to the curves, perhaps with the held-out loss measured. A collective call."""
        self.watchdog.allow(LONG_SECONDS)
        point, images_seen = self.curves.point(), self.state.images_seen
        if not (math.isfinite(point["train/loss"]) and math.isfinite(point["train/grad_norm_max"])):
            kept = f"the last good checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"
            found = f"loss {point['train/loss']}, gradient norm {point['train/grad_norm_max']}"
            reason = f"training diverged: {found} by images_seen = {images_seen}; {kept}"
            key, hint = "optimizer.learning_rate", "lower it or set optimizer.grad_clip_norm"
            raise DivergedError(key, reason, hint=hint, value=self.config.optimizer.learning_rate)
        self.last_loss = point["train/loss"]
        if self.probe is not None and measured:
            point |= self.probe.measure(self.state, dtype=self.options.autocast_dtype)
        point |= {"train/learning_rate": build.learning_rate(self.config, images_seen)}
        self.reported, self.reported_at = now_ms(), images_seen
        system = machine_usage(self.context.device) if self.context.rank == 0 else {}
        if self.sink:
            self.sink.log(system | point, images_seen, self.reported)
        if self.history is not None:
            self.history.add(point, images_seen, system=system, when=self.reported)

    def save(self) -> None:
        """Show a few images from the present weights, if there is time for them, and publish a checkpoint."""
        began, seen = time.perf_counter(), self.state.images_seen
        if self.sink and (png := preview_png(config=self.config, state=self.state, moments=self.moments.result())):
            if self.job.preview is not None:
                storage.write_bytes(self.job.preview(seen), png)
            self.sink.log({}, seen, self.reported, png=png)
        self.publish()
        self.pauses.append(time.perf_counter() - began)

    def save_between(self) -> None:
        """Save for a resume alone if it is time, a machine will be lost or training is to end. A collective call.

        Raises LeaseExpired if training is to end.
        """
        context, job, now = self.context, self.job, time.perf_counter()
        end = late = check = False
        if context.rank == 0:
            late = now - self.saved_at > RESUME_SECONDS
            check = now - self.checked_at >= CHECK_SECONDS
            if check:
                self.checked_at = now
                with suppress(OSError), limited(0):
                    end = job.stop is not None and storage.exists(job.stop)
                end |= job.lease is not None and job.lease.expired()
        end, late, check, fetching = map(bool, self.timer.exchange(end, late, check, self.split.fetching))
        self.watchdog.allow(LONG_SECONDS if fetching else 0.0, stepped=True)
        lost = check and not self.warned and context.preempted()
        self.warned |= lost
        if end or late or lost:
            self.publish(RESUME)
        if end:
            saved = f"saved {self.saved}" if self.saved else "nothing is saved"
            raise LeaseExpired(
                f"told to end, or without a launcher, at images_seen = {self.state.images_seen}; {saved}"
            )

    def publish(self, kind: str = "images-") -> None:
        """Publish a checkpoint, after a report, which finds a training that diverged. A collective call."""
        if self.reported_at < self.state.images_seen:
            self.report()
        self.watchdog.allow(LONG_SECONDS)
        name = folder_name(self.state.images_seen, kind)
        if kind != BEFORE_DECAY:  # from which this run does not resume
            self.saved, self.saved_at = name, time.perf_counter()
        if self.context.rank == 0:
            if self.history is not None:
                self.history.publish()
            write = checkpoint.snapshot(  # training goes on while it is written
                config=self.config,
                state=self.state,
                moments=self.moments.result(),
                dataset_digest=self.manifest.digest,
                classes=self.classes,
            )
            self.checkpoints.publish(write, name=name)


def train_loop(job: TrainingJob, context: WorkerContext, checkpoints: CheckpointStore) -> TrainOutcome:
    """Train from the newest whole checkpoint to the job's last image, rounded up to whole batches.

    Raises:
        DivergedError: The loss or a gradient is not finite; on every worker, and nothing is saved.
        LeaseExpired: The launcher is gone or `job.stop` exists; the state is saved.
    """
    train = job.config.train
    torch.set_num_threads(job.config.compute.cpus_per_worker)
    training = Training(job, context, checkpoints)
    started, first = time.perf_counter(), training.state.images_seen
    try:
        if context.rank == 0:
            job.progress.start(training.last_image, "images", done=first)
        if training.ended() and training.saved.startswith(RESUME):
            training.publish()  # the job became shorter since
        while not training.ended():
            if training.state.images_seen == decay_begins(job.config) and job.stop_at is None:  # no trial of a search
                training.publish(BEFORE_DECAY)
            training.step()
            save = training.ended() or training.crossed(train.checkpoint_every_images)
            probe = training.probe
            measured = probe is not None and (training.ended() or training.crossed(probe.every))
            if save or measured or training.crossed(train.report_every_images):
                training.report(measured=measured)
            if save:
                training.save()
            elif training.timer.due():
                training.save_between()
            if context.rank == 0:
                job.progress.advance(train.batch_size)
    except Exception:
        # MLflow may not have the last points yet, and training may not reach them again.
        if training.history is not None:
            with suppress(OSError):
                training.history.publish()
        raise
    finally:
        training.watchdog.stop()
        training.ahead.shutdown(cancel_futures=True)
        if training.sink:
            training.sink.close()
        checkpoints.wait()
    seconds = time.perf_counter() - started
    return TrainOutcome(
        images_seen=training.state.images_seen,
        loss=training.last_loss,
        images_per_second=(training.state.images_seen - first) / max(seconds, 1e-9),
        seconds=seconds,
        checkpoint=training.saved,
        computed=training.computed,
        notes=tuple(checkpoints.notes),
        pauses=tuple(training.pauses),
    )
