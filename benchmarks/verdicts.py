"""What the verdict says of finished runs, and of noise: for its two limits, `ncsn.report.words.CLOSE` and `FAR`.

    python -m benchmarks.verdicts ROOT RUN ... [--noise] [--pictures FOLDER]

ROOT is a store, RUN a run with samples. With `--noise`, uniform noise takes the place of the first run's samples.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np

from ncsn import storage
from ncsn.config import from_yaml
from ncsn.data.format import load_manifest
from ncsn.data.samples import shard_name, write_shard
from ncsn.progress import Progress
from ncsn.runs.layout import RunFolder
from ncsn.runs.metrics import read_metrics
from ncsn.runs.record import read_result
from ncsn.runs.results import IngestResult, SampleResult, TrainResult
from ncsn.steps.evaluate import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description="Verdicts on runs and on noise.")
    parser.add_argument("root")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--pictures", type=Path)
    args = parser.parse_args()
    print("| set | images trained | samples / test | beyond real, % | kernel distance, real | copies | verdict |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for run in args.runs:
        judge(args.root, run, pictures=args.pictures)
    if args.noise:
        judge(args.root, args.runs[0], pictures=None, noise=True)


def judge(root: str, run: str, *, pictures: Path | None, noise: bool = False) -> None:
    """Print the row of a run."""
    folder = RunFolder(root, run)
    config = from_yaml(storage.read_text(folder.config), overrides=[f"storage.root={root}"])
    made, ingested = read_result(folder, SampleResult), read_result(folder, IngestResult)
    trained = read_result(folder, TrainResult)
    assert made is not None
    assert ingested is not None
    assert trained is not None
    with tempfile.TemporaryDirectory() as temporary:
        samples = made.uri
        count = config.sampling.num_images
        if noise:
            shape = (count, *load_manifest(ingested.uri).pixels.shape)
            pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            samples = storage.join(temporary, "noise")
            write_shard(storage.join(samples, shard_name(0, count)), pixels)
        result = evaluate(config, samples=samples, dataset=ingested.uri, folder=temporary, progress=Progress())
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            shutil.copy(made.grid, pictures / f"{run}.png")
            shutil.copy(result.real_images, pictures / f"{run}-real.png")
    own, real = read_metrics(result.metrics), read_metrics(result.real_metrics)
    excess = [100 * own[f"excess{end}"].value for end in ("", "_low", "_high")]
    row = (
        "noise" if noise else run,
        "-" if noise else f"{trained.images_seen:,}",
        f"{result.num_images} / {result.num_real_images}",
        "{:.2f} ({:.2f} to {:.2f})".format(*excess),
        f"{own['kid'].value:.4g}, {real['kid'].value:.4g}",
        f"{result.audit['copies']['copies']} / {result.num_images}",
        result.grade,
    )
    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
