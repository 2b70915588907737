"""Ingestion of 28x28 images to Parquet: rows a second, and peak memory at 60,000 and 600,000 rows."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from benchmarks.measure import Row, own_process
from ncsn.config.schema import DataConfig
from ncsn.data.dataset import write_dataset
from ncsn.data.pixels import Example
from ncsn.data.sources.base import Source

FEW, MANY = 60_000, 600_000
TEST = 1_000
BLOCK = 10_000
SIZE = 28


@dataclass(frozen=True)
class Noise:
    """A split of one block of images, again and again: half of the pixels black, the others noise."""

    count: int
    seed: int = 0
    in_tasks: ClassVar[bool] = False

    def __len__(self) -> int:
        return self.count

    def section(self, first: int, last: int) -> Noise:
        """Images `first .. last`."""
        return Noise(min(last, self.count) - first, self.seed)

    def stream(self, *, cores: int | None = None) -> Iterator[Example]:  # noqa: ARG002
        """Each image; noise compresses worse than any photograph."""
        draw = np.random.default_rng(self.seed)
        shape = (BLOCK, SIZE, SIZE, 1)
        images = draw.integers(0, 256, shape, np.uint8) * draw.integers(0, 2, shape, np.uint8)
        labels = draw.integers(0, 10, BLOCK).tolist()
        for first in range(0, self.count, BLOCK):
            yield from map(Example, images[: self.count - first], labels)


def ingestion(folder: str, rows: int, found: str) -> None:
    """Ingest this many images, and leave seconds and the peak MiB after and before in the file `found`."""
    source = Source("noise", "none", tuple("0123456789"), {"train": Noise(rows), "test": Noise(TEST, seed=1)})
    data = DataConfig(source="mnist", image_size=SIZE, channels=1)
    before = peak_mebibytes()
    began = time.perf_counter()
    write_dataset(source, f"{folder}/store-{rows}", name="noise", data=data)
    Path(found).write_text(f"{time.perf_counter() - began} {peak_mebibytes()} {before}")


def peak_mebibytes() -> float:
    """Peak memory of this process. A process inherits the number of `getrusage` from its parent, so it is not used."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def rows() -> list[Row]:
    """The rate between the two sizes, without the fixed cost of an ingestion, and the memory of both."""
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (FEW, MANY):
            found = f"{folder}/found-{count}"
            with own_process(partial, ingestion, folder, count, found) as ingest:
                ingest()
            measured[count] = [float(word) for word in Path(found).read_text().split()]
    few, few_peak, base = measured[FEW]
    many, many_peak, _ = measured[MANY]
    return [
        Row(
            "ingest",
            f"rows of {SIZE}x{SIZE} images to Parquet",
            (MANY - FEW) / (many - few),
            unit="rows/s",
            target=100_000,
            detail=f"{few:.1f} s for {FEW:,} rows and {many:.1f} s for {MANY:,}",
        ),
        Row(
            "ingest",
            f"peak memory at {MANY:,} rows over that at {FEW:,}",
            many_peak / few_peak,
            target=1.1,
            higher_is_better=False,
            detail=f"{many_peak:.0f} and {few_peak:.0f} MiB, {base:.0f} of them libraries",
        ),
    ]


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
