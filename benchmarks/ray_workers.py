"""What Ray costs and what a second worker brings: images per second of the training loop with and without it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.digits_run import CONFIG
from benchmarks.measure import Row
from ncsn.config import Config, from_yaml
from ncsn.data.parquet import write_dataset
from ncsn.data.sources import open_source
from ncsn.distributed import trainer
from ncsn.distributed.local_cluster import ray_cluster
from ncsn.distributed.worker_context import LocalContext
from ncsn.distributed.worker_loop import TrainingJob, train_loop

IMAGES = 9_600


def rows(*, rounds: int = 2) -> list[Row]:
    """One worker over no Ray, and two workers over one, on the digits; a worker has one thread."""
    with tempfile.TemporaryDirectory() as folder:
        config = _config(folder, workers=1)
        dataset = write_dataset(open_source(config.data), f"{folder}/data", name="digits", data=config.data).uri
        speeds: dict[str, list[float]] = {"no Ray": [], "one worker": [], "two workers": []}
        for number in range(rounds):
            for name, train in (("no Ray", _without), ("one worker", _with_one), ("two workers", _with_two)):
                speeds[name].append(_apart(train, folder, dataset, f"{name.replace(' ', '-')}-{number}"))
    alone, one, two = speeds.values()
    return [
        Row(
            "Ray",
            "images/s of one worker over the same loop without Ray",
            100 * statistics.median(a / b for a, b in zip(one, alone, strict=True)),
            unit="%",
            target=97,
            detail=f"{statistics.median(one):,.0f} and {statistics.median(alone):,.0f} images/s",
        ),
        Row(
            "Ray",
            "images/s of two one-thread workers over one",
            statistics.median(a / b for a, b in zip(two, one, strict=True)),
            target=1.9,
            detail=f"{statistics.median(two):,.0f} and {statistics.median(one):,.0f} images/s",
        ),
    ]


def _apart(train: Callable[[str, str, str], float], folder: str, dataset: str, run: str) -> float:
    """In a process of its own: each has the same past."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(train, folder, dataset, run).result()


def _without(folder: str, dataset: str, run: str) -> float:
    job = TrainingJob(config=_config(folder, workers=1), dataset=dataset)
    return train_loop(job, LocalContext(Path(folder) / run)).images_per_second


def _with_one(folder: str, dataset: str, run: str) -> float:
    return train_on_ray(_config(folder, workers=1), dataset, f"{folder}/{run}")


def _with_two(folder: str, dataset: str, run: str) -> float:
    return train_on_ray(_config(folder, workers=2), dataset, f"{folder}/{run}")


def train_on_ray(config: Config, dataset: str, run_uri: str) -> float:
    """Images per second of a training on a Ray cluster of its own."""
    with ray_cluster(config):
        return trainer.train(TrainingJob(config=config, dataset=dataset), run_uri=run_uri).images_per_second


def _config(folder: str, *, workers: int) -> Config:
    overrides = [f"storage.root={folder}", f"compute.num_workers={workers}", "compute.cpus_per_worker=1"]
    lengths = [f"train.num_images={IMAGES}", f"train.checkpoint_every_images={IMAGES}"]
    return from_yaml(CONFIG.read_text(), overrides=overrides + lengths)


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
