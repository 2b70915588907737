"""The cost of Ray and the gain of a second worker: images per second of the training loop with and without them."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks.digits_run import CONFIG
from benchmarks.measure import Row
from ncsn import distributed
from ncsn.config import Config, from_yaml
from ncsn.data.dataset import write_dataset
from ncsn.data.sources import open_source
from ncsn.distributed.cluster import ray_cluster
from ncsn.model.checkpoint import CheckpointStore
from ncsn.training.context import WorkerContext
from ncsn.training.loop import TrainingJob, train_loop

IMAGES = 9_600  # of each worker
BATCH = 64  # of each worker
DIGITS: tuple[str, ...] = ()
# Turns the digits' experiment into one of the paper's network, as narrow as configs/fashion_mnist_ncsn.yaml.
PAPER = ("network={kind: ncsn, num_features: 16}", "data.image_size=28", "train.precision=bfloat16")


def rows(*, rounds: int = 2) -> list[Row]:
    """One worker over the loop without Ray, and two workers over one; a worker has one thread."""
    with tempfile.TemporaryDirectory() as folder:
        digits = speeds(DIGITS, f"{folder}/digits", rounds=rounds, without_ray=True)
        paper = speeds(PAPER, f"{folder}/paper", rounds=rounds)
    return [
        Row(
            "Ray",
            "images/s of one worker over the same loop without Ray, on the digits",
            100 * statistics.median(a / b for a, b in zip(digits["1"], digits["no Ray"], strict=True)),
            unit="%",
            target=97,
            detail=f"{statistics.median(digits['1']):,.0f} and {statistics.median(digits['no Ray']):,.0f} images/s",
        ),
        _two_over_one("of the paper's network with 16 channels at 28x28", paper),
        _two_over_one("on the digits", digits),
    ]


def _two_over_one(what: str, measured: dict[str, list[float]]) -> Row:
    return Row(
        "Ray",
        f"images/s of two one-thread workers over one, {what}, batch {BATCH} each",
        statistics.median(a / b for a, b in zip(measured["2"], measured["1"], strict=True)),
        target=1.8,
        detail=f"{statistics.median(measured['2']):,.0f} and {statistics.median(measured['1']):,.0f} images/s",
    )


def speeds(changes: tuple[str, ...], folder: str, *, rounds: int, without_ray: bool = False) -> dict[str, list[float]]:
    """Images per second of each round by one and two workers, and optionally without Ray."""
    dataset = images(changes, folder)
    ways: dict[str, Callable[..., float]] = {"no Ray": _without} if without_ray else {}
    ways |= {"1": partial(_on_ray, workers=1), "2": partial(_on_ray, workers=2)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, train in ways.items():
            found[name].append(_apart(train, changes, folder, dataset, f"{name.replace(' ', '-')}-{number}"))
    return found


def images(changes: tuple[str, ...], folder: str) -> str:
    """The dataset of the experiment."""
    data = config(changes, folder, workers=1).data
    return write_dataset(open_source(data), f"{folder}/data", name="digits", data=data).uri


def _apart(train: Callable[..., float], *args: object) -> float:
    """In a separate process, so that each has the same history."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(train, *args).result()


def _without(changes: tuple[str, ...], folder: str, dataset: str, run: str) -> float:
    job = TrainingJob(config=config(changes, folder, workers=1), dataset=dataset)
    return train_loop(job, WorkerContext(), CheckpointStore(str(Path(folder) / run))).images_per_second


def _on_ray(changes: tuple[str, ...], folder: str, dataset: str, run: str, *, workers: int) -> float:
    return train_on_ray(config(changes, folder, workers=workers), dataset, f"{folder}/{run}")


def train_on_ray(settings: Config, dataset: str, run_uri: str) -> float:
    """Images per second of a training on a new Ray cluster."""
    with ray_cluster(settings):
        return distributed.train(TrainingJob(config=settings, dataset=dataset), run_uri=run_uri).images_per_second


def config(changes: tuple[str, ...], folder: str, *, workers: int) -> Config:
    """The digits' experiment with `changes`, short, for one-thread workers."""
    overrides = [f"storage.root={folder}", f"compute.num_workers={workers}", "compute.cpus_per_worker=1"]
    images = IMAGES * workers
    lengths = [f"train.{name}={images}" for name in ("num_images", "checkpoint_every_images")]
    lengths.append(f"train.batch_size={BATCH * workers}")
    return from_yaml(CONFIG.read_text(), overrides=[*overrides, *lengths, *changes])


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
