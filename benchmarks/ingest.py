"""Ingestion of 28x28 images to Parquet: rows a second from IDX files, and peak memory at 60,000 and 600,000 rows."""

from __future__ import annotations

import re
import struct
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import Row, own_process
from ncsn.config.schema import DataConfig
from ncsn.data.parquet import write_dataset
from ncsn.data.sources import open_source

FEW, MANY, TEST = 60_000, 600_000, 1_000
SIZE = 28


def ingestion(folder: str, rows: int, found: str) -> None:
    """Write and ingest this many images, and write seconds, CPU seconds and peak MiB to the file `found`."""
    draw = np.random.default_rng(0)
    root = Path(folder) / f"idx-{rows}"
    root.mkdir()
    for prefix, count in (("train", rows), ("t10k", TEST)):
        _write_idx(root / f"{prefix}-images-idx3-ubyte", (count, SIZE, SIZE), draw)
        _write_idx(root / f"{prefix}-labels-idx1-ubyte", (count,), draw)
    data = DataConfig(source="mnist", root=str(root), image_size=SIZE, channels=1)
    before = peak_mebibytes()
    began, worked = time.perf_counter(), time.process_time()
    write_dataset(open_source(data), f"{folder}/store-{rows}", name="mnist", data=data)
    seconds = (time.perf_counter() - began, time.process_time() - worked)
    Path(found).write_text(f"{seconds[0]} {seconds[1]} {peak_mebibytes()} {before}")


def peak_mebibytes() -> float:
    """Peak memory of this process. A process inherits the number of `getrusage` from its parent, so it is not used."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def _write_idx(path: Path, shape: tuple[int, ...], draw: np.random.Generator) -> None:
    """Half of the pixels are black and half are noise, which compresses worse than photographs; labels 0 to 9."""
    with path.open("wb") as file:
        file.write(struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape))
        for first in range(0, shape[0], 10_000):
            block = (min(10_000, shape[0] - first), *shape[1:])
            labels = len(shape) == 1
            values = draw.integers(0, 10 if labels else 256, block, np.uint8)
            file.write((values if labels else values * draw.integers(0, 2, block, np.uint8)).tobytes())


def rows() -> list[Row]:
    """The rate between the two sizes, without the fixed cost of an ingestion, and the memory of both."""
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (FEW, MANY):
            found = f"{folder}/found-{count}"
            with own_process(_prepare, folder, count, found) as ingest:
                ingest()
            measured[count] = [float(word) for word in Path(found).read_text().split()]
    (few, few_cpu, few_peak, base), (many, many_cpu, many_peak, _) = measured[FEW], measured[MANY]
    return [
        Row(
            "ingest",
            f"rows of {SIZE}x{SIZE} images from IDX files to Parquet",
            (MANY - FEW) / (many - few),
            unit="rows/s",
            target=100_000,
            detail=f"{few:.1f} s for {FEW:,} rows and {many:.1f} s for {MANY:,}; "
            f"{1e6 * (many_cpu - few_cpu) / (MANY - FEW):.1f} µs of CPU per row",
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


def _prepare(folder: str, count: int, found: str):  # noqa: ANN202 - a call without arguments
    return lambda: ingestion(folder, count, found)


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
