"""Quality against the number of network evaluations: one checkpoint, many samplers.

    python -m benchmarks.samplers CHECKPOINT DATASET SETTINGS.yaml

SETTINGS.yaml lists settings, each with a name, a `sampler` as in a config's `sampling.sampler`, and optionally
`precision`, `num_images`, `batch_size`, `label`, `guidance` and `levels`. Images stay below --work by what they depend
on, so a second call makes only the missing ones. Seconds are CPU seconds of one core for 64 images, the median over the
new batches, so other load on the machine changes them little. With --seeds N the figures are means over N sets of
images, and the distance has its standard deviation over them. For a model with classes, `agreement` is the share of
the images that the classifier sees as the class that was asked for.

--set evaluation.extractor=clusters lets another network judge. --set evaluation.reference_split=test compares with the
test images, and real training images with them.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ncsn.config import Config, from_yaml, to_yaml
from ncsn.config.schema import SamplingConfig
from ncsn.data.format import load_manifest
from ncsn.data.training_images import open_cache
from ncsn.evaluation.class_scores import RequestedClasses
from ncsn.evaluation.extractors import joined
from ncsn.evaluation.features import extractor_of
from ncsn.evaluation.measure import measure_extracted
from ncsn.evaluation.reference import open_evaluator
from ncsn.model.checkpoint import TrainedNetwork, load_checkpoint
from ncsn.model.generate import generate, image_labels

QUOTED = 64  # the table has the seconds for this many images


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    sampling: SamplingConfig
    folder: Path

    @property
    def batches(self) -> list[tuple[int, int, Path]]:
        """First image, number of images and file of each batch."""
        count, size = self.sampling.num_images, self.sampling.batch_size
        bounds = [(first, min(first + size, count)) for first in range(0, count, size)]
        return [(first, last - first, self.folder / f"{first:06d}-{last:06d}.npz") for first, last in bounds]


@dataclass(frozen=True)
class Row:
    """The result of a setting."""

    name: str
    nfe: int
    num_images: int
    seconds_per_64: float
    fid: float
    kid: float
    score: float
    recall: float
    agreement: float | None  # None without classes


def main() -> None:
    """Make the images, measure them and print the table."""
    options = _options()
    checkpoint = load_checkpoint(options.checkpoint)
    config = from_yaml(to_yaml(checkpoint.config), overrides=options.overrides)
    entries = yaml.safe_load(options.settings.read_text())
    common = {"num_images": options.num_images, "batch_size": options.batch_size}
    settings = [
        setting
        for seed in range(options.seeds)
        for setting in settings_of(entries, checkpoint, common={**common, "seed": seed}, work=options.work)
    ]
    make_images(options.checkpoint, settings, processes=options.processes)
    rows = measured(options.dataset, config, settings, num_images=options.num_images)
    print("| sampler | NFE | seconds per 64 images | FID | KID x 1000 | score | recall | agreement | images |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, nfe, count in dict.fromkeys((row.name, row.nfe, row.num_images) for row in rows):
        sets = [row for row in rows if (row.name, row.nfe, row.num_images) == (name, nfe, count)]
        mean = {key: statistics.fmean(getattr(row, key) for row in sets) for key in ("fid", "kid", "score", "recall")}
        spread = f" ± {statistics.stdev(row.fid for row in sets):.2f}" if len(sets) > 1 else ""
        score = "" if math.isnan(mean["score"]) else f"{mean['score']:.2f}"
        seconds = statistics.median(row.seconds_per_64 for row in sets)
        known = [row.agreement for row in sets if row.agreement is not None]
        agreement = f"{statistics.fmean(known):.3f}" if known else ""
        print(
            f"| {name} | {nfe} | {seconds:.2f} | {mean['fid']:.2f}{spread} | {1000 * mean['kid']:.1f} "
            f"| {score} | {mean['recall']:.3f} | {agreement} | {len(sets)} x {count:,} |"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quality against the number of network evaluations.")
    parser.add_argument("checkpoint", help="folder of a checkpoint")
    parser.add_argument("dataset", help="folder of the ingested dataset, with labels")
    parser.add_argument("settings", type=Path, help="YAML list of {name, sampler, precision, ...}")
    parser.add_argument("--num-images", type=int, default=10_000, help="images per setting that does not say its own")
    parser.add_argument("--seeds", type=int, default=1, help="sets of images per setting, of seeds 0, 1, ...")
    parser.add_argument("--batch-size", type=int, default=256, help="images made at once, likewise")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--work", type=Path, default=Path(".ncsn/benchmarks/samplers"), help="where images are kept")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="a.b=value of the config")
    return parser.parse_args()


def settings_of(
    entries: list[dict[str, Any]], checkpoint: TrainedNetwork, *, common: dict[str, int], work: Path
) -> list[Setting]:
    """The entries of a settings file, over `common` settings of a config's section `sampling`."""
    settings = []
    for entry in entries:
        sampling = SamplingConfig.model_validate(common | {key: value for key, value in entry.items() if key != "name"})
        kept_by = {"sampler", "seed", "precision", "batch_size", "label", "guidance", "levels"}
        key = sampling.model_dump_json(include=kept_by) + checkpoint.digest
        settings.append(Setting(entry["name"], sampling, work / hashlib.sha256(key.encode()).hexdigest()[:16]))
    return settings


def make_images(checkpoint: str, settings: list[Setting], *, processes: int) -> None:
    """Generate the missing images, in processes of one thread each."""
    tasks = [(setting.sampling, *batch) for setting in settings for batch in setting.batches if not batch[2].exists()]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_make_batch, checkpoint, *task) for task in tasks]
        for count, future in enumerate(as_completed(futures), start=1):
            future.result()
            if count % 20 == 0 or count == len(tasks):
                print(f"{time.strftime('%H:%M:%S')} {count} of {len(tasks)} batches", flush=True)


def _make_batch(checkpoint: str, sampling: SamplingConfig, first: int, count: int, target: Path) -> None:
    torch.set_num_threads(1)
    trained = _load(checkpoint)
    began = time.process_time()
    images = generate(trained, sampling=sampling, first=first, count=count)
    seconds = time.process_time() - began
    labels = image_labels(trained, sampling, first=first, count=count)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part.npz")
    np.savez(part, images=images, seconds=seconds, labels=np.full(count, -1) if labels is None else labels.numpy())
    part.replace(target)


@lru_cache(maxsize=1)
def _load(uri: str) -> TrainedNetwork:
    return load_checkpoint(uri)


def measured(dataset: str, config: Config, settings: list[Setting], *, num_images: int) -> list[Row]:
    """Quality and speed of the images, and the quality of as many real images of the other split."""
    train, test = open_cache(dataset, "train"), open_cache(dataset, "test")
    num_classes = len(load_manifest(dataset).class_names)
    versus = config.evaluation.reference_split
    evaluator = open_evaluator(config, dataset)
    own = evaluator.name.startswith("classifier")
    extractor = extractor_of(config, dataset)

    def row(name: str, images: list[np.ndarray], labels: np.ndarray, **known: Any) -> Row:
        figures = measure_extracted(
            joined([extractor.extract(batch) for batch in images]),
            reference=evaluator.reference,
            num_splits=10,
            requested=RequestedClasses(labels, (test if versus == "test" else train).labels, num_classes, own=own),
        ).metrics
        values: dict[str, Any] = {key: figures[key].value for key in ("fid", "kid", "recall")}
        values["score"] = figures["score"].value if "score" in figures else math.nan
        values["agreement"] = figures["class_agreement"].value if "class_agreement" in figures else None
        return Row(name=name, num_images=sum(map(len, images)), **values, **known)

    rows = [
        row(
            setting.name,
            images,
            labels,
            nfe=setting.sampling.sampler.num_evaluations(config.levels.num_levels),
            seconds_per_64=statistics.median(seconds),
        )
        for setting in settings
        for images, labels, seconds in [_kept(setting)]
    ]
    others = train if versus == "test" else test
    real = others.images[:num_images]
    batches = [real[first : first + QUOTED] for first in range(0, len(real), QUOTED)]
    labels = others.labels[:num_images]
    name = f"real {'training' if versus == 'test' else 'test'} images"
    return [*rows, row(name, batches, labels, nfe=0, seconds_per_64=0.0)]


def _kept(setting: Setting) -> tuple[list[np.ndarray], np.ndarray, list[float]]:
    """The images of a setting, their classes (-1: none), and of each whole batch the seconds for 64."""
    images, labels, seconds = [], [], []
    for _, count, file in setting.batches:
        with np.load(file) as stored:
            images.append(stored["images"])
            labels.append(stored["labels"])
            if count == setting.sampling.batch_size:
                seconds.append(float(stored["seconds"]) * QUOTED / count)
    return images, np.concatenate(labels), seconds


if __name__ == "__main__":
    main()
