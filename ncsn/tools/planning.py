"""What a pipeline run will take: seconds, CPU and GPU hours, money, energy, memory and storage.

Plain arithmetic on the rates that `ncsn.tools.trial_run` measures, or, for machines that are not here, on the network's
FLOP and a rate that is assumed. The measurements without steps are at the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ncsn.config import Config
from ncsn.config.compute import bytes_of
from ncsn.core.held_out import MOST_BINS
from ncsn.core.training import EVALUATIONS_PER_STEP
from ncsn.evaluation.extractors.base import Extractor, Images
from ncsn.evaluation.extractors.classifier import SMALL_SET, ClassifierRecipe, Labels, train_classifier
from ncsn.evaluation.measure import NEIGHBOR_IMAGES, pixel_neighbors
from ncsn.model import build
from ncsn.model.checkpoint_store import NEWEST
from ncsn.model.generate import evaluations_per_image
from ncsn.model.memory import kept_bytes, worker_memory
from ncsn.progress import Progress
from ncsn.runs.costs import Prices, cost_of, total
from ncsn.runs.steps import STEPS, STEPS_BY_WORKERS
from ncsn.training.held_out import effort_of

GIGABYTE = 1e9
_STATE_BYTES = 5 * 4  # per parameter in float32: weights, their average, gradients, and Adam's two moments
_BACKWARD = 2  # FLOP over those of the forward pass
NEIGHBOR_SEARCHES = 2  # of an evaluation in the training images: for the samples and for real test images


@dataclass(frozen=True)
class Counts:
    """How much of everything a config asks for."""

    train_images: int
    test_images: int
    shards: int  # batches of generated images
    nfe: int


@dataclass(frozen=True)
class Rates:
    """What a trial run measures; seconds unless the name says otherwise."""

    cluster_start: float  # to start or join a Ray cluster
    process_start: float  # of one step, with its imports
    fixed: Mapping[str, float]  # step -> its time that does not grow with the config
    ingest_image: float
    train_image: float  # by all workers together
    checkpoint: float  # save and publish one, with its preview
    sample_evaluation: float  # of one batch, while all workers are busy
    classifier_image: float  # in one epoch of the classifier's training
    extract_image: float
    neighbour_image: float  # one training image in one search for nearest neighbors
    worker_bytes: float  # memory of a training worker
    machine_bytes: float  # memory of the cluster
    dataset_image_bytes: float  # stored
    checkpoint_bytes: float
    sample_bytes: float  # of one stored image


def step_seconds(config: Config, counts: Counts, rates: Rates) -> dict[str, float]:
    """The seconds of each step, as the step itself reports them."""
    train, evaluation, sampling = config.train, config.evaluation, config.sampling
    images = math.ceil(train.num_images / train.batch_size) * train.batch_size
    waves = math.ceil(counts.shards / config.compute.max_workers)
    splits = counts.train_images, counts.test_images
    reference, others = splits if evaluation.reference_split == "train" else splits[::-1]
    measured = reference + sampling.num_images + min(others, sampling.num_images)
    passes = 0 if evaluation.pretrained else evaluation.classifier_epochs
    # GPUs share the features. The CPUs of one machine already do so in the trial run.
    extractors = config.compute.max_workers if config.compute.use_gpu else 1
    of_training_image = passes * rates.classifier_image + NEIGHBOR_SEARCHES * rates.neighbour_image
    work = {
        "ingest": (counts.train_images + counts.test_images) * rates.ingest_image,
        "train": images * rates.train_image
        + num_checkpoints(config) * rates.checkpoint
        + _validation_seconds(config, counts, rates),
        "sample": waves * counts.nfe * rates.sample_evaluation,
        "evaluate": counts.train_images * of_training_image + measured * rates.extract_image / extractors,
        "register": 0.0,
        "report": 0.0,
    }
    return {step: rates.fixed[step] + work[step] for step in STEPS}


def _validation_seconds(config: Config, counts: Counts, rates: Rates) -> float:
    """Seconds of what is measured during training; by default that is a small share of the time."""
    train, workers = config.train, config.compute.max_workers
    seconds = 0.0
    if train.validation.images:
        effort = effort_of(config, held_out=counts.test_images, training=counts.train_images)
        if effort is not None:
            evaluations = MOST_BINS * (effort.held_out + effort.training)
            seconds += evaluations * rates.train_image / EVALUATIONS_PER_STEP
    if "fid" in train.judges.values():
        samples = train.validation.samples / workers
        batches = math.ceil(samples / config.sampling.batch_size)
        seconds += batches * counts.nfe * rates.sample_evaluation + samples * rates.extract_image
    return math.ceil(train.num_images / train.validate_every) * seconds


def num_checkpoints(config: Config) -> int:
    """Checkpoints that the training publishes."""
    every, images = config.train.checkpoint_every_images, config.train.num_images
    return images // every + (images % every > 0)


def estimate(config: Config, counts: Counts, rates: Rates, prices: Prices) -> dict[str, Any]:
    """The plan as plain values: steps, total, start_seconds, memory, pods, storage, notes, and the arguments."""
    costs = {
        step: cost_of(config, step, seconds, prices) for step, seconds in step_seconds(config, counts, rates).items()
    }
    return {
        "steps": {step: asdict(cost) for step, cost in costs.items()},
        "total": asdict(total(costs)),
        "start_seconds": rates.cluster_start + (len(STEPS) + 1) * rates.process_start,
        "memory": _memory(config, rates),
        "pods": _pods(config, counts),
        "storage": _storage(config, counts, rates, prices),
        "notes": build.noise_notes(config, images=config.train.num_images),
        "prices": asdict(prices),
        "rates": asdict(rates),
        "counts": asdict(counts),
    }


def _memory(config: Config, rates: Rates) -> dict[str, Any]:
    needed = config.compute.max_workers * rates.worker_bytes
    return {
        "worker_gb": rates.worker_bytes / GIGABYTE,
        "workers_gb": needed / GIGABYTE,
        "machine_gb": rates.machine_bytes / GIGABYTE,
        "fits": needed <= rates.machine_bytes,
    }


def _pods(config: Config, counts: Counts) -> dict[str, float] | None:
    """The worker pods of the RayJobs by the step with the most memory; None for another backend."""
    compute = config.compute
    if not compute.starts_pods:
        return None
    size, given = compute.kuberay.workers_per_pod, compute.kuberay.memory_per_worker
    estimates = (worker_memory(config, step, reference_images=counts.train_images) for step in STEPS_BY_WORKERS)
    worker = max(estimates) if given is None else bytes_of(given)
    return {
        "count": compute.max_pods,
        "workers": size,
        "cpus": size * compute.cpus_per_worker,
        "gpus": size if compute.use_gpu else 0,
        "memory_gb": size * worker / GIGABYTE,
    }


def _storage(config: Config, counts: Counts, rates: Rates, prices: Prices) -> dict[str, float]:
    data = config.data
    images = counts.train_images + counts.test_images
    sizes = {
        "dataset_gb": images * rates.dataset_image_bytes / GIGABYTE,
        "checkpoints_gb": _checkpoints(config) * rates.checkpoint_bytes / GIGABYTE,
        "samples_gb": config.sampling.num_images * rates.sample_bytes / GIGABYTE,
    }
    return sizes | {
        "store_gb": sum(sizes.values()),
        "node_cache_gb": images * data.image_size**2 * data.channels / GIGABYTE,
        "money_per_month": sum(sizes.values()) * prices.storage_gb_month,
    }


def forward_flop(network: nn.Module, config: Config) -> int:
    """FLOP of one image in a network on the device `meta`; a multiplication and its addition are two."""
    data = config.data
    image = torch.zeros(1, data.channels, data.image_size, data.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image, torch.zeros(1, dtype=torch.int64, device="meta"))
    return int(counter.get_total_flops())


def predict(config: Config, prices: Prices, *, tflops: float) -> dict[str, Any]:
    """Time and cost of training and sampling, and the memory of a worker, as plain values.

    The config has noise levels; `tflops` is the rate of each worker.
    """
    network = build.network(config).to("meta")  # on a CPU it takes shortcuts
    parameters = sum(parameter.numel() for parameter in network.parameters())
    flop, kept = forward_flop(network, config), kept_bytes(network, config)
    compute, train, sampling = config.compute, config.train, config.sampling
    rate, nfe = 1e12 * tflops * compute.max_workers, evaluations_per_image(config)
    of_training = (1 + _BACKWARD) * flop
    samples = sampling.num_images
    seconds = {"train": of_training * train.num_images / rate, "sample": flop * nfe * samples / rate}
    together = compute.microbatch or math.ceil(train.batch_size / compute.max_workers)
    maps = kept * together / (1 if train.precision == "float32" else 2)
    return {
        "tflops": tflops,
        "workers": compute.max_workers,
        "parameters": parameters,
        "gflop": {"sample": flop / 1e9, "train": of_training / 1e9},
        "images_per_second": rate / of_training,
        "nfe": nfe,
        "steps": {step: asdict(cost_of(config, step, value, prices)) for step, value in seconds.items()},
        "notes": build.noise_notes(config, images=train.num_images),
        "worker_gb": (_STATE_BYTES * parameters + maps) / GIGABYTE,
        "prices": asdict(prices),
    }


def _checkpoints(config: Config) -> float:
    """Checkpoints that the store keeps, those with the EMA alone and snapshots of two averages by their share."""
    train, made = config.train, num_checkpoints(config)
    # Weights, Adam's two moments, and one EMA or two. A snapshot has two in half the precision.
    snapshots, ema = 0, 1 / 4
    if train.snapshot_every is not None:
        snapshots, ema = train.num_images // train.snapshot_every, 1 / 5
    whole = min(NEWEST if train.keep_checkpoints == "all" else train.keep_checkpoints, made)
    thin = made - whole
    if train.keep_checkpoints != "all":
        thin = min(thin, train.num_images // train.keep_every_images) if train.keep_every_images else 0
    return whole + train.keep_best + (thin + snapshots) * ema


_TILED_BYTES = 1 << 28


def seconds_per_image(extractor: Extractor, images: Images, *, batch_size: int) -> float:
    """Seconds of one image in the extractor, by its second batch; the first warms up."""
    batch = np.array(images[:batch_size])
    extractor.extract(batch)
    started = time.perf_counter()
    extractor.extract(batch)
    return (time.perf_counter() - started) / len(batch)


def search_seconds_per_image(images: Images) -> float:
    """Seconds of one training image in a search for nearest neighbors, by the second search."""
    queries = np.array(images[:NEIGHBOR_IMAGES])
    pixel_neighbors(queries, images)
    started = time.perf_counter()
    pixel_neighbors(queries, images)
    return (time.perf_counter() - started) / len(images)


def training_seconds_per_image(recipe: ClassifierRecipe, *, images: Images, labels: Labels, seconds: float) -> float:
    """Seconds of one image in one epoch over a large set, which has other batches and threads than a small one.

    The images [N, H, W, C] and their labels [N] are repeated until they are a large set. It takes about `seconds`.
    """
    tiles = min(math.ceil(SMALL_SET / len(images)), max(1, _TILED_BYTES // images.nbytes))
    ticks: list[tuple[float, int]] = []

    class Watch(Progress):
        def _changed(self) -> None:
            ticks.append((time.perf_counter(), self.done))
            if ticks[-1][0] - ticks[0][0] > seconds:
                raise _EnoughError

    with suppress(_EnoughError):
        many = np.tile(images, (tiles, 1, 1, 1))
        train_classifier(recipe, images=many, labels=np.tile(labels, tiles), progress=Watch())
    (first, done), (last, more) = ticks[0], ticks[-1]
    return (last - first) / max(more - done, 1)


class _EnoughError(Exception):
    """The measurement is long enough."""
