"""Time to quality: a recipe with changes, trained for a fixed budget; one line of a table for each seed.

    python -m benchmarks.speedrun configs/digits_edm.yaml --images 46667 --out digits.jsonl
    python -m benchmarks.speedrun configs/digits_edm.yaml --images 46667 --out digits.jsonl --set optimizer.decay=linear
    python -m benchmarks.speedrun --show digits.jsonl

The budget is images at the recipe's cost: a change by which an image costs r times as much has 1 / r of the images. The
steps of both are timed in turns in this process, with one thread. The held-out loss is that of the EMA weights on the
test images, with noise and weight of the recipe (those of Karras et al. for one that trains at levels), so it may be
compared between changes. With --samples 0 nothing else is measured. Otherwise a line has too, of --samples images:
the kernel distance and recall by `clusters`, the recipe's own Fréchet distance, and how many images are copies.

`--base a.b=value` changes the recipe itself, for both sides, as one change after the other is kept. Trainings, images
and ratios stay below --work, so what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.measure import in_turns, ratio
from ncsn import storage
from ncsn.config import Config, from_yaml, training_settings
from ncsn.config.training import LognormalTraining, edm_mean
from ncsn.core.keyed_random import COMMON_SEED, Stream
from ncsn.core.losses import EdmWeight, losses_at
from ncsn.core.training_noise import LognormalNoise
from ncsn.data.format import read_split
from ncsn.distributed.sampling import make_shards, plan_shards
from ncsn.model.checkpoint import CheckpointStore, load_checkpoint
from ncsn.progress import Progress
from ncsn.steps.evaluate import evaluate
from ncsn.steps.ingest import write_images
from ncsn.training.batches import encoded, gray_words
from ncsn.training.context import WorkerContext
from ncsn.training.loop import DivergedError, Training, TrainingJob, train_loop

HELD_OUT = 1000  # most test images of the held-out loss
HELD_OUT_BATCH = 250
ROUNDS = 11  # of the timing
IMAGES = 1024  # in each round
SAME_COST = (  # settings that no step costs more or less by
    "name",
    "seed",
    "data.root",
    "noise.training.mean",
    "noise.training.std",
    "optimizer.decay",
    "optimizer.decay_images",
    "optimizer.learning_rate",
    "optimizer.muon.learning_rate",
    "optimizer.warmup_images",
    "train.label_dropout",
    "train.num_images",
)
COLUMNS = {  # key of a line -> head of its column, and how a number is shown
    "change": ("change", "{}"),
    "images": ("images", "{:,.0f}"),
    "ratio": ("r", "{:.2f}"),
    "held_out": ("held-out loss", "{:.4f}"),
    "kid": ("kernel distance", "{:.1f}"),
    "fid": ("FID", "{:.2f}"),
    "recall": ("recall", "{:.3f}"),
    "copies": ("copies", "{:.0f}"),
}


def main() -> None:
    """Append a line for each seed, or show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", help="a config")
    parser.add_argument("--show", type=Path, help="print this table as Markdown, with means over the seeds")
    parser.add_argument("--out", type=Path, help="table to append to, a JSON object a line")
    parser.add_argument("--images", type=int, help="the budget")
    parser.add_argument("--base", action="append", default=[], help="a.b=value of both sides")
    parser.add_argument("--set", dest="change", action="append", default=[], help="a.b=value of the change")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--work", type=Path, default=Path(".ncsn/benchmarks/speedrun"))
    options = parser.parse_args()
    if options.show is not None:
        print(table([json.loads(line) for line in options.show.read_text().splitlines()]))
        return
    if options.recipe is None or options.out is None or options.images is None:
        parser.error("needs a recipe, --out and --images, or --show")
    text = options.recipe.read_text()
    work = str(options.work.absolute())
    alone = ["compute.num_workers=1", "compute.cpus_per_worker=1", *options.base]
    recipe = from_yaml(text, overrides=alone)
    changed = from_yaml(text, overrides=[*alone, *options.change])
    torch.set_num_threads(1)
    dataset = write_images(recipe, work).uri
    times = cost_ratio(recipe, changed, dataset=dataset, work=work)
    what = ", ".join(options.change) or ("the recipe" + (f" with {', '.join(options.base)}" if options.base else ""))
    for seed in options.seeds:
        length = [f"train.num_images={round(options.images / times)}", f"seed={seed}"]
        config = from_yaml(text, overrides=[*alone, *options.change, *length])
        line: dict[str, Any] = {"change": what, "seed": seed, "images": config.train.num_images, "ratio": times}
        try:
            checkpoint = trained(config, dataset=dataset, work=work)
        except DivergedError:
            line["held_out"] = None
        else:
            line["held_out"] = held_out(recipe, checkpoint, dataset=dataset)
            if options.samples:
                line |= quality(config, checkpoint, dataset=dataset, count=options.samples, work=work)
        print(table([line]).splitlines()[-1], flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def cost_ratio(recipe: Config, changed: Config, *, dataset: str, work: str) -> float:
    """How many times as long the changed training takes for an image, timed in turns."""

    def costs(config: Config) -> dict[str, Any]:
        settings = {**training_settings(config), "microbatch": config.compute.microbatch}
        return {key: value for key, value in settings.items() if key not in SAME_COST}

    if costs(recipe) == costs(changed):
        return 1.0
    place = storage.join(work, "ratios", storage.digest([costs(recipe), costs(changed)], 16) + ".json")
    if (known := storage.find_json(place)) is None:
        with TemporaryDirectory() as folder:
            sides = {}
            for name, config in (("changed", changed), ("recipe", recipe)):
                endless = config.train.model_copy(update={"num_images": 10**9})
                job = TrainingJob(config.model_copy(update={"train": endless}), dataset)
                training = Training(job, WorkerContext(), CheckpointStore(f"{folder}/{name}"))
                steps = max(1, IMAGES // config.train.batch_size)
                sides[name] = lambda each=training, count=steps: [each.step() for _ in range(count)]
            found = ratio(in_turns(sides, rounds=ROUNDS), "changed", "recipe")
        images = [max(1, IMAGES // each.train.batch_size) * each.train.batch_size for each in (changed, recipe)]
        known = {"ratio": round(found * images[1] / images[0], 3)}
        storage.write_json(place, known)
    return float(known["ratio"])


def trained(config: Config, *, dataset: str, work: str) -> str:
    """URI of the checkpoint at the end of the training."""
    length = config.train.num_images
    key = storage.digest(training_settings(config) | {"length": length, "dataset": dataset}, 16)
    place = storage.join(work, "trainings", key, "checkpoints")
    rare = config.train.model_copy(update={"checkpoint_every_images": length})
    job = TrainingJob(config.model_copy(update={"train": rare}), dataset)
    return storage.join(place, train_loop(job, WorkerContext(), CheckpointStore(place, keep=1)).checkpoint)


def held_out(recipe: Config, checkpoint: str, *, dataset: str) -> float:
    """The loss of Karras et al. on test images, with noise and weight of the recipe.

    It is measured at ten equally probable sigmas; noise and images are those of the held-out loss of a training.
    """
    noise = recipe.noise.training
    sigma_data = getattr(recipe.network, "sigma_data", None)
    assert sigma_data, "a network with a sigma_data"
    if not isinstance(noise, LognormalTraining):  # of a recipe that trains at levels
        noise = LognormalTraining(kind="lognormal", mean=edm_mean(sigma_data))
    sigmas = LognormalNoise(noise.mean, noise.std).bins
    test = read_split(dataset, "test")
    model = load_checkpoint(checkpoint)
    parts = []
    for first in range(0, min(HELD_OUT, len(test.images)), HELD_OUT_BATCH):
        part = slice(first, min(first + HELD_OUT_BATCH, HELD_OUT))
        images = torch.from_numpy(np.array(test.images[part]))
        gray = gray_words(model.config, images, seed=COMMON_SEED, stream=Stream.HELD_OUT_DEQUANTIZE, first=first)
        x = encoded(model.config, images, gray)
        labels = None if model.config.data.num_classes is None else torch.from_numpy(np.array(test.labels[part]))
        stream = Stream.HELD_OUT_NOISE
        with torch.inference_mode():
            losses = losses_at(model.network, x, first=first, sigmas=sigmas, levels=None, stream=stream, labels=labels)
        parts.append(losses)
    weight = EdmWeight(sigma_data)(sigmas.double())
    return float((weight[:, None] * torch.cat(parts, dim=1).double()).mean())


def sampled(config: Config, checkpoint: str, *, work: str) -> str:
    """URI of the samples of a checkpoint, made or from `work`."""
    folder = f"{work}/samples/{storage.digest([checkpoint, config.sampling.model_dump(mode='json')], 16)}"
    make_shards(config, plan_shards(config, checkpoint=checkpoint, folder=folder), progress=Progress())
    return folder


def quality(config: Config, checkpoint: str, *, dataset: str, count: int, work: str) -> dict[str, float]:
    """Distances, recall and copies of `count` samples."""
    sampling = config.sampling.model_copy(update={"num_images": count})
    config = config.model_copy(update={"sampling": sampling})
    samples = sampled(config, checkpoint, work=work)
    found = []
    for extractor in (config.evaluation.extractor, "clusters"):
        settings = config.evaluation.model_copy(update={"extractor": extractor})
        judged = config.model_copy(update={"evaluation": settings})
        result = evaluate(judged, samples=samples, dataset=dataset, folder=f"{samples}/of", progress=Progress())
        names = [(re.fullmatch(r"eval/[a-z]+_(\w+)_n(\d+)", key), value) for key, value in result.metrics.items()]
        # Of what is measured for fewer images too, as many as there are test images, that of most.
        by_count = sorted((int(name[2]), name[1], value) for name, value in names if name)
        found.append({figure: value for _, figure, value in by_count})
    own, clusters = found
    return {"kid": clusters["kid"], "fid": own["fid"], "recall": clusters["recall"], "copies": count * own["copies"]}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, a row for each change and budget, with the means over its seeds and, of several, least and largest."""
    heads = [head for head, _ in COLUMNS.values()]
    rows = [f"| {' | '.join(heads)} | seeds |", "|---" + "|---:" * len(heads) + "|"]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["change"], line["images"]), []).append(line)
    for group in groups.values():
        cells = []
        for key, (_, shown) in COLUMNS.items():
            values = [line[key] for line in group if line.get(key) is not None]
            if not values:
                cells.append("diverged" if key == "held_out" else "")
            elif isinstance(values[0], str) or min(values) == max(values):
                cells.append(shown.format(values[0]))
            else:
                mean, *ends = map(shown.format, (statistics.fmean(values), min(values), max(values)))
                cells.append(f"{mean} ({' to '.join(ends)})")
        rows.append(f"| {' | '.join(cells)} | {' '.join(str(line['seed']) for line in group)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
