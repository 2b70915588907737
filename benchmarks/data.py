"""The training batches of the memory-mapped cache against the same images in memory."""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import Row, in_turns, ratio
from ncsn import storage
from ncsn.data.training_images import CachedSplit

IMAGES, SIZE, BATCH = 60_000, 28, 128
BATCHES = 400


def cache_row(*, rounds: int) -> Row:
    """Read the shuffled images of a step as float32, from the file and from memory."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        memory = draw.integers(0, 256, (IMAGES, SIZE, SIZE, 1), dtype=np.uint8)
        np.save(Path(folder) / "images.npy", memory)
        cached = storage.mapped(Path(folder) / "images.npy")

        def gather(source: NDArray[np.uint8]) -> None:
            split = CachedSplit(source, np.empty(IMAGES))
            for step in range(BATCHES):
                places = split.order(0, first=step * BATCH, count=BATCH)
                torch.from_numpy(source[places]).float()

        seconds = in_turns({"cache": partial(gather, cached), "memory": partial(gather, memory)}, rounds=rounds)
    speed = {name: BATCHES / statistics.median(values) for name, values in seconds.items()}
    return Row(
        "data",
        f"batches of {BATCH} from the memory-mapped cache over the same images in memory, {SIZE}x{SIZE}",
        100 * ratio(seconds, "memory", "cache"),
        unit="%",
        target=95,
        detail=f"{speed['cache']:,.0f} and {speed['memory']:,.0f} batches/s",
    )


def rows() -> list[Row]:
    """The row of the cache."""
    return [cache_row(rounds=5)]


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
