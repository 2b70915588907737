"""How listing, ingestion and training grow with the number of images, of 8x8 pixels.

    python -m benchmarks.many_images [IMAGES ...]

Each row is measured in a separate process, with its CPU seconds too. Memory is the peak beyond its imports. Ten million
images take ten minutes and 2 GB of the temporary folder.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.ingest import TEST, Noise, peak_mebibytes
from ncsn.config.schema import DataConfig
from ncsn.data.dataset import write_dataset
from ncsn.data.sources.base import Source, source_fingerprint
from ncsn.data.sources.image_folder import open_image_folder
from ncsn.data.sources.parquet_files import open_parquet
from ncsn.data.training_images import open_training_images

COUNTS = (100_000, 1_000_000, 10_000_000)
MOST_FILES = 1_000_000  # as many inodes
SIDE, BATCH, A_FOLDER, CLASSES = 8, 128, 1_000, 100
FETCHED = 10  # seconds after which the next window is there

Found = dict[str, tuple[float, float, float]]  # what was done -> seconds, CPU seconds, and peak MiB


def fill(place: Path, count: int) -> None:
    """A Parquet file of bytes that are no images, sorted by class, and empty files in a folder."""
    (place / "parquet").mkdir(parents=True)
    labels = np.arange(count) * CLASSES // count
    table = pa.table({"image": pa.repeat(b"x", count), "label": labels})
    pq.write_table(table, place / "parquet" / "images.parquet")
    for first in range(0, count if count <= MOST_FILES else 0, A_FOLDER):
        folder = place / "folder" / f"class-{first // A_FOLDER % CLASSES:02d}" / f"{first // A_FOLDER:06d}"
        folder.mkdir(parents=True)
        for number in range(first, first + A_FOLDER):
            (folder / f"image-{number:08d}.png").touch()


def list_folder(place: Path, count: int) -> Found:
    """The files are listed as images are."""
    if count > MOST_FILES:
        return {}
    data = DataConfig(source="image_folder", root=str(place / "folder"), image_size=SIDE, channels=1)
    return timed({"fingerprint": partial(source_fingerprint, data), "open a folder": partial(open_image_folder, data)})


def list_parquet(place: Path, count: int) -> Found:  # noqa: ARG001
    """The choice of the test images, and the classes."""
    data = DataConfig(source="parquet", root=str(place / "parquet"), image_size=SIDE, channels=1)
    return timed({"open a Parquet file": partial(open_parquet, data)})


def ingest(place: Path, count: int) -> Found:
    """A dataset from a source that costs little."""
    splits = {"train": Noise(count, SIDE), "test": Noise(TEST, SIDE, seed=1)}
    source = Source("noise", "none", tuple("0123456789"), splits)
    data = DataConfig(source="mnist", image_size=SIDE, channels=1)
    return timed({"ingest": partial(write_dataset, source, str(place / "store"), name="noise", data=data)})


def train(place: Path, count: int) -> Found:
    """The first batch with an empty cache, and that over the end of the epoch once the window after it is fetched."""
    os.environ["NCSN_CACHE_DIR"] = str(place / "cache")
    (manifest,) = (place / "store").glob("*/manifest.json")
    split = open_training_images(str(manifest.parent))
    found = timed({"first batch": partial(split.ordered, 0, first=0, count=BATCH)})
    split.ordered(0, first=count - 10 * BATCH, count=BATCH)
    time.sleep(FETCHED)
    return found | timed({"change of epoch": partial(split.ordered, 0, first=count - BATCH // 2, count=BATCH)})


def timed(calls: dict[str, Callable[[], object]]) -> Found:
    """Of each, with the peak beyond what was there before the first."""
    found, before = {}, peak_mebibytes()
    for what, call in calls.items():
        began, worked = time.perf_counter(), time.process_time()
        call()
        found[what] = time.perf_counter() - began, time.process_time() - worked, peak_mebibytes() - before
    return found


def main() -> None:
    """Print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=int, default=COUNTS)
    print("| images | | s | CPU s | CPU s per million | MiB |\n|---:|---|---:|---:|---:|---:|", flush=True)
    for count in parser.parse_args().images:
        with tempfile.TemporaryDirectory() as folder:
            for call in (fill, list_folder, list_parquet, ingest, train):
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    found = pool.submit(call, Path(folder), count).result()
                for what, (seconds, worked, mebibytes) in (found or {}).items():
                    figures = f"{seconds:.3g} | {worked:.3g} | {1e6 * worked / count:.3g} | {mebibytes:.0f}"
                    print(f"| {count:,} | {what} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
