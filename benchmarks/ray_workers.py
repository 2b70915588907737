"""The cost of Ray and the gain of a second worker: images per second of the training loop with and without them."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks.measure import Row, ratio
from ncsn import distributed
from ncsn.config import Config, from_yaml
from ncsn.data.dataset import write_dataset
from ncsn.data.sources import open_source
from ncsn.distributed.cluster import ray_cluster
from ncsn.model.checkpoint import CheckpointStore
from ncsn.training.context import WorkerContext
from ncsn.training.loop import TrainingJob, train_loop

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
IMAGES = 9_600  # of each worker
BATCH = 64  # of each worker


def rows(*, rounds: int = 2) -> list[Row]:
    """One worker over the loop without Ray, and two workers over one, on the digits; a worker has one thread."""
    ways: dict[str, Callable[..., float]] = {
        "no Ray": without_ray,
        "1": partial(on_ray, workers=1),
        "2": partial(on_ray, workers=2),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        data = config(folder, workers=1).data
        dataset = write_dataset(open_source(data), f"{folder}/data", name="digits", data=data).uri
        for number in range(rounds):
            for name, train in ways.items():
                # In a separate process, so that each has the same history.
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    run = f"{folder}/{name.replace(' ', '-')}-{number}"
                    speeds[name].append(pool.submit(train, folder, dataset, run).result())
    return [
        Row(
            "ray",
            "images/s of one worker over the same loop without Ray, on the digits",
            100 * ratio(speeds, "1", "no Ray"),
            unit="%",
            target=97,
            detail=f"{statistics.median(speeds['1']):,.0f} and {statistics.median(speeds['no Ray']):,.0f} images/s",
        ),
        Row(
            "ray",
            f"images/s of two one-thread workers over one, on the digits, batch {BATCH} each",
            ratio(speeds, "2", "1"),
            target=1.8,
            detail=f"{statistics.median(speeds['2']):,.0f} and {statistics.median(speeds['1']):,.0f} images/s",
        ),
    ]


def without_ray(folder: str, dataset: str, run: str) -> float:
    """Images per second of the loop in this process."""
    job = TrainingJob(config=config(folder, workers=1), dataset=dataset)
    return train_loop(job, WorkerContext(), CheckpointStore(run)).images_per_second


def on_ray(folder: str, dataset: str, run: str, *, workers: int) -> float:
    """Images per second of a training on a new Ray cluster."""
    settings = config(folder, workers=workers)
    with ray_cluster(settings):
        return distributed.train(TrainingJob(config=settings, dataset=dataset), run_uri=run).images_per_second


def config(folder: str, *, workers: int) -> Config:
    """The digits' experiment, short, for one-thread workers."""
    images = IMAGES * workers
    overrides = [
        f"storage.root={folder}",
        f"compute.num_workers={workers}",
        "compute.cpus_per_worker=1",
        f"train.num_images={images}",
        f"train.checkpoint_every_images={images}",
        f"train.batch_size={BATCH * workers}",
    ]
    return from_yaml(CONFIG.read_text(), overrides=overrides)


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
