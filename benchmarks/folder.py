"""Ingestion of a folder of JPEGs against a plain loop of Pillow over a pool of two processes.

    python -m benchmarks.folder [--images 100000] [--rounds 1]

Both sides read the same files from the page cache on the same number of cores, in turns, and give the same pixels.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.ingest import peak_mebibytes
from benchmarks.measure import Row
from ncsn.config import from_yaml

IMAGES, STORED, SIZE = 100_000, 256, 64
CROPS, QUALITY, A_FOLDER = 100, 90, 1_000
PROCESSES, CHUNK = 2, 64
SPARE = 2  # Pillow's own thumbnails too are drafted at twice their size or more
EXPERIMENT = """
name: folder
data: {{source: image_folder, root: {root}, image_size: {size}, channels: 3, test_fraction: 0.1}}
network: {{kind: unet, widths: [8]}}
train: {{num_images: 128, checkpoint_every_images: 128, report_every_images: 128}}
sampling: {{sampler: {{kind: annealed_langevin}}}}
"""


class Side(NamedTuple):
    """What one side took."""

    seconds: float
    cpu_seconds: float  # of its processes together
    mebibytes: float = 0.0  # peak


def photographs(folder: Path, count: int) -> None:
    """Write JPEGs: blends of cuts of scikit-learn's two photographs, no two alike."""
    starts = range(0, count, A_FOLDER)
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        list(pool.map(partial(_write_some, folder, count), starts))


def _write_some(folder: Path, count: int, first: int) -> None:
    cuts, draw = _cuts(), np.random.default_rng(first)
    place = folder / f"{first // A_FOLDER:03d}"
    place.mkdir(parents=True)
    for number in range(first, min(first + A_FOLDER, count)):
        one, other = (cuts[index] for index in draw.integers(0, len(cuts), 2))
        picture = Image.blend(one, other, draw.uniform(0, 0.5))
        picture.save(place / f"{number:06d}.jpg", quality=QUALITY)


@cache
def _cuts() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [_cut(photograph, draw) for photograph in load_sample_images().images for _ in range(CROPS)]


def _cut(photograph: NDArray[np.uint8], draw: np.random.Generator) -> Image.Image:
    height, width, _ = photograph.shape
    side = int(draw.integers(160, height))
    top, left = int(draw.integers(0, height - side)), int(draw.integers(0, width - side))
    return Image.fromarray(photograph[top : top + side, left : left + side]).resize((STORED, STORED))


def load(path: str, spare: int = SPARE) -> NDArray[np.uint8]:
    """An image as a plain loop reads it."""
    with Image.open(path) as image:
        image.draft("RGB", (spare * SIZE, spare * SIZE))
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def plain(folder: Path, *, spare: int = SPARE) -> Side:
    """The images of a folder in the memory of this process, one after the other."""
    files = sorted(map(str, folder.rglob("*.jpg")))
    began, worked = time.perf_counter(), _cpu_seconds()
    with get_context("fork").Pool(PROCESSES) as pool:  # its processes import nothing
        read = sum(image.shape == (SIZE, SIZE, 3) for image in pool.imap(partial(load, spare=spare), files, CHUNK))
        pool.close()
        pool.join()
    assert read == len(files)
    return Side(time.perf_counter() - began, _cpu_seconds() - worked)


def ingest(folder: Path, store: str) -> Side:
    """The ingestion of a folder, from the listing to the published dataset."""
    from ncsn.steps.ingest import write_images

    config = from_yaml(EXPERIMENT.format(root=folder, size=SIZE))
    began, worked = time.perf_counter(), _cpu_seconds()
    write_images(config, store)
    return Side(time.perf_counter() - began, _cpu_seconds() - worked, peak_mebibytes())


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def apart(function: partial[Side]) -> Side:
    """The call in a process that has done nothing before."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function).result()


def measure(folder: Path, images: int, *, rounds: int) -> list[Row]:
    """The rows, of the folder's photographs."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        some = folder.parent / f"{folder.name}-tenth"
        photographs(some, images // 10)
        few = apart(partial(ingest, some, f"{scratch}/few"))
        sides: dict[str, list[Side]] = {"ingest": [], "plain": [], "drafted at its size": []}
        for number in range(rounds):
            sides["plain"].append(apart(partial(plain, folder)))
            sides["ingest"].append(apart(partial(ingest, folder, f"{scratch}/{number}")))
            sides["drafted at its size"].append(apart(partial(plain, folder, spare=1)))
    many = max(side.mebibytes for side in sides["ingest"])
    return [
        Row(
            "folder",
            f"images/s of {images:,} JPEGs of {STORED}x{STORED} to {SIZE}x{SIZE} over a plain pool of {PROCESSES}",
            100 * _ratio(sides, "plain", "seconds"),
            unit="%",
            target=90,
            detail=", ".join(_described(name, found, images) for name, found in sides.items()),
        ),
        Row(
            "folder",
            "CPU seconds of the plain pool over those of the ingestion",
            100 * _ratio(sides, "plain", "cpu_seconds"),
            unit="%",
            detail=f"{100 * _ratio(sides, 'drafted at its size', 'cpu_seconds'):.0f} % if the pool decodes at 64x64",
        ),
        Row(
            "folder",
            f"peak memory at {images:,} images over that at {images // 10:,}",
            many / few.mebibytes,
            target=1.1,
            higher_is_better=False,
            detail=f"{many:.0f} and {few.mebibytes:.0f} MiB",
        ),
    ]


def _ratio(sides: dict[str, list[Side]], other: str, field: str) -> float:
    pairs = zip(sides[other], sides["ingest"], strict=True)
    return float(statistics.median(getattr(theirs, field) / getattr(ours, field) for theirs, ours in pairs))


def _described(name: str, sides: list[Side], images: int) -> str:
    seconds = statistics.median(side.seconds for side in sides)
    cpu = statistics.median(side.cpu_seconds for side in sides)
    return f"{name} {images / seconds:,.0f}/s with {1e6 * cpu / images:.0f} µs of CPU"


def rows(images: int = IMAGES, *, rounds: int = 1) -> list[Row]:
    """The rows, of photographs made for them, 2 GB of them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photographs"
        photographs(folder, images)
        return measure(folder, images, rounds=rounds)


def main() -> None:
    """Measure as many images as wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    for row in rows(options.images, rounds=options.rounds):
        print(row, flush=True)


if __name__ == "__main__":
    main()
