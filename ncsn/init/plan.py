"""What training and sampling will take, by a few steps on noise that are measured here."""

from __future__ import annotations

import copy
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ncsn import storage
from ncsn.config import Config
from ncsn.config.schema import UtilityConfig
from ncsn.config.training import AutoNoiseConfig, NoiseConfig
from ncsn.core.losses import Batch
from ncsn.core.noise_schedule import best_epsilon
from ncsn.core.samplers.settings import AnnealedLangevin
from ncsn.core.training import train_step
from ncsn.data.format import Manifest, load_manifest
from ncsn.data.noise_levels import resolve_noise
from ncsn.errors import UserError
from ncsn.evaluation.utility import unbalanced
from ncsn.evaluation.utility_training import RATES, TRIED, augmentation, network_for
from ncsn.model import build
from ncsn.model.generate import evaluations_per_image
from ncsn.model.memory import kept_bytes
from ncsn.model.objective import noise_notes, objective_of
from ncsn.report.words import duration, slowdown, takes
from ncsn.runs.layout import images_seen_at, run_folder
from ncsn.runs.record import cost_of, read_result
from ncsn.runs.results import IngestResult
from ncsn.runs.run import state_to_continue

_STATE_BYTES = 5 * 4  # per parameter in float32: weights, their average, gradients, and Adam's two moments
MEASUREMENTS, SECONDS = 10, 0.5  # the fastest counts; no more of them after so long
_STEP = 1.2  # of the grid of settled times
_SAME = 1.5  # times as long are the same: times that vary by 15 % stay within 1.15 / 0.85 and half a step of the grid
# Of several workers together, by one that has the machine for itself: they exchange gradients and share its caches.
TOGETHER = 0.75


@dataclass(frozen=True)
class Machine:
    """What there is to compute on."""

    cores: int
    gpus: int
    gpu: str = ""  # name of the first

    @classmethod
    def here(cls) -> Machine:
        gpus = torch.cuda.device_count()
        return cls(len(os.sched_getaffinity(0)), gpus, torch.cuda.get_device_name() if gpus else "")

    @property
    def workers(self) -> int:
        """Workers that use it well: one for each GPU, else one for each core up to four."""
        return self.gpus or min(4, self.cores)

    @property
    def cores_per_worker(self) -> int:
        """Its cores, divided."""
        return max(1, self.cores // self.workers)

    def __str__(self) -> str:
        if self.gpus:
            return f"{self.gpus} {self.gpu}"
        return f"{self.cores} CPU core{'s' * (self.cores > 1)}"


@dataclass(frozen=True)
class Speed:
    """Seconds of all workers together."""

    train_image: float
    evaluate_image: float  # in one network evaluation of a sampler


def measure_speed(config: Config) -> Speed:
    """Time a few training steps and evaluations of one worker's share; the config has noise levels."""
    if config.compute.use_gpu and not torch.cuda.is_available():
        raise UserError("compute.use_gpu", "no GPU here to measure", hint="use false", value=True)
    workers, cores = config.compute.max_workers, config.compute.cpus_per_worker
    device = torch.device(config.compute.device)
    count = max(1, config.train.batch_size // workers)
    with build.torch_threads(cores):
        state, objective = build.train_state(config, device=device), objective_of(config)
        options = build.step_options(config, world_size=1)
        taught = build.frozen(copy.deepcopy(state.network), config) if config.loss.has_teacher else None
        loss, pairs = objective.loss(state.uncertainty, taught), objective.pairs
        sigma, level = objective.noise.draw(0, first=0, count=count)
        lower = None if pairs is None else pairs.lower(sigma).to(device)
        conditions = {"labels": torch.zeros(count, dtype=torch.int64, device=device)} if config.data.num_classes else {}
        x, z = (torch.randn(count, *config.data.network_shape, device=device) for _ in range(2))
        level = level if level is None else level.to(device)
        x = x.to(memory_format=build.memory_format(config))
        batch = Batch(x, sigma.to(device), z, level, z, conditions, lower)

        def train(part: Batch) -> None:
            train_step(state.network, part, state=state, loss=loss, options=options)

        @torch.inference_mode()
        def evaluate(part: Batch) -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.autocast_dtype is not None):
                score: Tensor = state.network(part.x, **part.inputs)
            return score

        together = workers * (TOGETHER if workers > 1 else 1.0)
        train_image, evaluate_image = (_seconds(work, batch, count, device) for work in (train, evaluate))
        return Speed(train_image / together, evaluate_image / together)


def _seconds(work: Callable[[Any], object], batch: Any, size: int, device: torch.device) -> float:
    """Of an image of the batch of this size, or of its first ones if they take long enough."""
    # A CPU's own time, so that other work on the machine does not count.
    on_gpu = device.type == "cuda"
    clock, threads = (time.perf_counter, 1) if on_gpu else (time.process_time, torch.get_num_threads())

    def call(count: int) -> None:
        work(batch[:count])
        if on_gpu:
            torch.cuda.synchronize(device)

    images, begun, measured = 0, clock(), list[float]()
    while len(measured) < MEASUREMENTS and (not measured or clock() - begun < SECONDS * threads):
        if images < size:  # all of a large network would take minutes on a CPU
            images = min(max(1, 4 * images), size)
            call(images)  # warms up
            measured.clear()
        started = clock()
        call(images)
        measured.append((clock() - started) / threads / images)
    return min(measured)  # the others shared caches with what else runs here


def settled(seconds: float, *what: object) -> float:
    """A measured time on a coarse grid, or that of an earlier call here unless it now takes a third less.

    So neither noise of the timing nor the load of the machine changes what is chosen by it.
    """
    here = (platform.node(), str(Machine.here()), torch.backends.cpu.get_cpu_capability(), torch.__version__)
    file = storage.cache_folder() / "speeds" / f"{storage.digest([*here, *what], 16)}.json"
    with suppress(OSError, ValueError, TypeError):  # no such file, or not ours
        if (known := float(storage.read_json(str(file)))) <= _SAME * seconds:
            return known
    on_grid = _STEP ** round(math.log(max(seconds, 1e-9), _STEP))
    with suppress(OSError):
        storage.write_json(str(file), on_grid)
    return on_grid


def work_of(wish: UtilityConfig, counts: Sequence[float]) -> tuple[float, int]:
    """Generated images and classifiers for classes of these numbers of training images."""
    balancing, most = unbalanced(counts), max(wish.ratios)
    images = sum(max(most * count, (max(counts) - count) * balancing) for count in counts)
    return images, wish.seeds * (3 + len(wish.ratios) + 2 * balancing) + TRIED * len(RATES)


def seconds_per_update(wish: UtilityConfig, shape: Sequence[int], *, classes: int, device: str, cores: int) -> float:
    """Of one classifier of images of this height, width and channels, on this number of cores."""
    (height, width, channels), network = shape, network_for(shape, classes).to(device)
    augment, optimizer = augmentation(height, width, mirrors=True), torch.optim.AdamW(network.parameters(), RATES[0])

    def update(images: Tensor) -> None:
        x = torch.stack([augment(image) for image in images])
        optimizer.zero_grad()
        F.cross_entropy(network(x), torch.zeros(len(x), dtype=torch.int64, device=device)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    images = torch.randn(wish.batch_size, channels, height, width, device=device)
    with build.torch_threads(cores):
        return wish.batch_size * _seconds(update, images, len(images), torch.device(device))


def with_levels(config: Config, run: str) -> Config:
    """The config with what `noise: auto` chooses for the run's dataset; `UserError` while the run has none."""
    if not isinstance(config.noise, AutoNoiseConfig):
        return config
    if ingested := read_result(run_folder(config, run), IngestResult):
        return resolve_noise(config, load_manifest(ingested.uri))
    reason = "chosen from images that are not ingested yet"
    raise UserError("noise", reason, hint="run `ncsn ingest` first", value="auto")


def chosen_levels(config: Config, run: str) -> list[str]:
    """What `noise: auto` chooses for the run's dataset, for people; empty while the run has none."""
    if read_result(run_folder(config, run), IngestResult) is None:
        return []
    levels = with_levels(config, run).noise
    assert isinstance(levels, NoiseConfig)
    lines = [f"noise: {{sigma_1: {levels.sigma_1:g}, sigma_L: {levels.sigma_L:g}, num_levels: {levels.num_levels}}}"]
    sampler = config.sampling.sampler
    if isinstance(sampler, AnnealedLangevin) and levels.num_levels > 1:
        ratio = (levels.sigma_1 / levels.sigma_L) ** (1 / (levels.num_levels - 1))
        steps = sampler.steps_per_level
        epsilon = best_epsilon(sigma_L=levels.sigma_L, ratio=ratio, steps_per_level=steps)
        lines.append(f"sampling.sampler.epsilon: {epsilon:.3g} fits {steps} steps per level (NCSNv2, technique 4)")
    return lines


def without_values(config: Config) -> tuple[nn.Module, dict[str, tuple[int, Callable[[], object]]]]:
    """The network on the device `meta`; by step, images of one worker and what computes them once there."""
    shape = config.data.network_shape
    share = math.ceil(config.train.batch_size / config.compute.max_workers)
    with torch.device("meta"):
        network = build.network(config).to("meta")
        loss = objective_of(config).loss(None, copy.deepcopy(network).eval() if config.loss.has_teacher else None)
        images, samples = torch.empty(share, *shape), torch.empty(config.sampling.batch_size, *shape)
        of_images, of_samples = (torch.empty(len(each), dtype=torch.int64) for each in (images, samples))
    level = None if config.noise.training.kind == "lognormal" else of_images
    sigma, conditions = images[:, 0, 0, 0], {"labels": of_images} if config.data.num_classes else {}
    batch = Batch(images, sigma, images, level, images, conditions, lower=sigma)
    evaluate = torch.no_grad()(lambda: network(samples, of_samples))

    def train() -> None:  # FlopCounterMode fails at a gradient with respect to a leaf
        torch.autograd.backward(loss(lambda x, **given: network(x.view_as(x), **given), batch).loss)

    return network, {"train": (share, train), "sample": (len(samples), evaluate)}


def plan(config: Config, run: str) -> dict[str, Any]:
    """The estimate by the speed of this machine, measured."""
    config = with_levels(config, run)
    basis, speed = f"measured on this machine ({Machine.here()})", measure_speed(config)
    found = estimate(config, speed, basis=basis)
    if not config.compute.use_gpu:
        found["slowdown"] = slowdown(config.compute.max_workers * config.compute.cpus_per_worker)
    if config.utility is None:
        return found
    if (ingested := read_result(run_folder(config, run), IngestResult)) is None:
        found["notes"].append("The step utility is not counted: run `ncsn ingest` first, which counts the classes.")
        return found
    (seconds,) = _utility_seconds(config, load_manifest(ingested.uri), speed, [config.utility])
    found["steps"]["utility"] = cost_of(config, "utility", seconds)._asdict()
    return found


def _utility_seconds(config: Config, manifest: Manifest, speed: Speed, wishes: Sequence[UtilityConfig]) -> list[float]:
    """What the step utility takes as each wishes, whose batches are alike."""
    compute, counts, found = config.compute, manifest.class_counts["train"], []
    each = seconds_per_update(
        wishes[0], manifest.pixels.shape, classes=len(counts), device=compute.device, cores=compute.cpus_per_worker
    )
    for wish in wishes:
        images, trainings = work_of(wish, counts)
        generating = images * evaluations_per_image(config) * speed.evaluate_image
        found.append(generating + trainings * wish.updates * each / compute.max_workers)
    return found


def utility_line(config: Config, run: str) -> str:
    """How long the step utility takes on this machine, and a shorter one; empty for a run without classes."""
    ingested = read_result(run_folder(config, run), IngestResult)
    if config.data.num_classes is None or ingested is None:
        return ""
    config, wish = with_levels(config, run), config.utility or UtilityConfig()
    shorter = {"updates": math.ceil(wish.updates / 4), "ratios": (min(wish.ratios),)}
    wishes = [wish, wish.model_copy(update=shorter)]
    long, short = _utility_seconds(config, load_manifest(ingested.uri), measure_speed(config), wishes)
    times = slowdown(config.compute.max_workers * config.compute.cpus_per_worker)
    settings = f"--set utility.updates={shorter['updates']} --set 'utility.ratios=[{min(wish.ratios):g}]'"
    return f"utility takes {takes(long, times=times)}, less what is done already; {duration(short)} with {settings}"


def estimate(config: Config, speed: Speed, *, basis: str) -> dict[str, Any]:
    """Seconds and reserved hours of training and sampling, and a worker's memory, as plain values.

    The config has noise levels. `basis` says in words where the speed is from.
    """
    compute, train, sampling = config.compute, config.train, config.sampling
    nfe = evaluations_per_image(config)
    network, work = without_values(config)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    gflop = {}
    for step, (images, compute_once) in work.items():
        with FlopCounterMode(display=False) as counter:
            compute_once()
        gflop[step] = counter.get_total_flops() / images / 1e9
    done = 0 if train.continue_from is None else images_seen_at(state_to_continue(config))
    taken = {
        "train": (train.num_images - done) * speed.train_image,
        "sample": sampling.num_images * nfe * speed.evaluate_image,
    }
    together = compute.microbatch or work["train"][0]
    maps = kept_bytes(network, config) * together / (1 if train.precision == "float32" else 2)
    narrow = train.precision == "bfloat16" and compute.use_gpu  # the teacher's weights
    steps = {step: cost_of(config, step, seconds)._asdict() for step, seconds in taken.items()}
    return {
        "steps": steps,
        "basis": basis,
        "images_per_second": 1 / speed.train_image,
        "nfe": nfe,
        "parameters": parameters,
        "gflop": gflop,
        "worker_gb": ((_STATE_BYTES + (2 if narrow else 4) * config.loss.has_teacher) * parameters + maps) / 1e9,
        "notes": noise_notes(config, images=train.num_images),
    }
