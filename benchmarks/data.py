"""The training batches of the memory-mapped cache against a tensor in memory."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Row, in_turns, ratio
from ncsn.data.cache import CachedSplit, image_indices

IMAGES, SIZE, BATCH = 60_000, 28, 128
BATCHES = 400


def cache_row(*, rounds: int) -> Row:
    """Gathering the shuffled images of a step as float32, from the file and from memory."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        mapped = np.lib.format.open_memmap(
            Path(folder) / "images.npy", mode="w+", dtype=np.uint8, shape=(IMAGES, SIZE, SIZE, 1)
        )
        mapped[:] = draw.integers(0, 256, mapped.shape, dtype=np.uint8)
        mapped.flush()
        images = np.load(Path(folder) / "images.npy", mmap_mode="r")
        split = CachedSplit(images=images, labels=np.memmap(Path(folder) / "labels", np.int64, "w+", shape=(IMAGES,)))
        memory = torch.from_numpy(np.array(images))

        def cached() -> None:
            for step in range(BATCHES):
                places = image_indices(0, first=step * BATCH, count=BATCH, size=len(split))
                torch.from_numpy(split.images[places]).float()

        def in_memory() -> None:
            for step in range(BATCHES):
                places = image_indices(0, first=step * BATCH, count=BATCH, size=IMAGES)
                memory[torch.from_numpy(places)].float()

        seconds = in_turns({"cache": cached, "memory": in_memory}, rounds=rounds)
    speed = {name: BATCHES / statistics.median(values) for name, values in seconds.items()}
    return Row(
        "data",
        f"batches of {BATCH} from the memory-mapped cache over a tensor in memory, {SIZE}x{SIZE}",
        100 * ratio(seconds, "memory", "cache"),
        unit="%",
        target=95,
        detail=f"{speed['cache']:,.0f} and {speed['memory']:,.0f} batches/s",
    )


def rows() -> list[Row]:
    """The row of the cache."""
    torch.set_num_threads(1)
    return [cache_row(rounds=5)]


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
