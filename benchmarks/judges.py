"""Recipes judged by networks that no recipe has: how far their samples are from the training images.

    python -m benchmarks.judges configs/digits_edm.yaml --seeds 1 2 3 --out digits.jsonl
    python -m benchmarks.judges configs/digits_edm.yaml --seeds 1 2 3 --out digits.jsonl --set train.num_images=100000
    python -m benchmarks.judges --show digits.jsonl

Three classifiers of different architectures (`BODIES`), none that of `ncsn evaluate`, are trained on all training
images of a dataset with classes; `--judge-seed N` trains three others, to confirm what the first have chosen. Each
judges --samples images of each seed of the recipe with the settings of --set, and the real test images.

Which class a sample shows is left to chance, and to how the training ended. So that this does not hide all else, the
figures are of three quarters of the samples, chosen to have the classes' shares of the training images; `shares` is the
total variation between these shares and those of all samples. `of all` is the Fréchet distance of those chosen. The
other figures are means of sets of about as many as there are test images, so that samples and real images compare.
Distances are in percent of the variance of the training images' features. The least of so many images is that of
training images drawn again, with replacement.

The table has the means over judges and seeds. An interval (95 %) is that of the mean over other seeds and samples: by
the spread between seeds in the logarithm, which all rows share, or by the jackknife over the images if that is more.
Judges, trainings and samples stay below --work, where those of `benchmarks.speedrun` are, so what is there is not made
again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors, save as save_tensors
from scipy.stats import t as student
from torch import Tensor, nn

from benchmarks.speedrun import sampled, trained
from ncsn import storage
from ncsn.config import from_yaml
from ncsn.core.keyed_random import COMMON_SEED, keyed_permutation
from ncsn.data.format import Rows, load_manifest, read_split
from ncsn.data.samples import SampleSet
from ncsn.evaluation.extractors import Extracted, Images, batches, joined
from ncsn.evaluation.frechet import (
    JACKKNIFE_GROUPS,
    Array,
    FrechetStatistics,
    frechet_distance,
    frechet_jackknife,
    merged,
)
from ncsn.evaluation.scores import inception_score, precision_recall
from ncsn.steps.ingest import write_images

NUM_FEATURES = 96
STEPS = 3000  # of the training of a judge
BATCH = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
REAL = "real test images"
AGAIN = "training images, drawn again"
FIGURES = {  # of sets of equal numbers: key of a line -> head of its column, and how it is shown
    "equal": ("distance", "{:.2f}"),
    "confidence": ("confidence", "{:.4f}"),
    "score": ("score", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "shares": ("shares", "{:.3f}"),
}


def main() -> None:
    """Append a line for each seed, or show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", help="a config")
    parser.add_argument("--show", type=Path, help="print this table as Markdown")
    parser.add_argument("--out", type=Path, help="table to append to, a JSON object a line")
    parser.add_argument("--set", dest="change", action="append", default=[], help="a.b=value of the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=5120)
    parser.add_argument("--judge-seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(".ncsn/benchmarks/speedrun"))
    options = parser.parse_args()
    if options.show is not None:
        print(table([json.loads(line) for line in options.show.read_text().splitlines()]))
        return
    if options.recipe is None or options.out is None:
        parser.error("needs a recipe and --out, or --show")
    text = options.recipe.read_text()
    work = str(options.work.absolute())
    alone = ["compute.num_workers=1", "compute.cpus_per_worker=1", *options.change]
    torch.set_num_threads(1)
    dataset = write_images(from_yaml(text, overrides=alone), work).uri
    train, test = (read_split(dataset, split) for split in ("train", "test"))
    classes = len(load_manifest(dataset).class_names)
    jury = [
        Seat.of(judge, train, test)
        for judge in judges(dataset, train, num_classes=classes, seed=options.judge_seed, work=work)
    ]
    known = options.out.read_text().splitlines() if options.out.exists() else []
    lines: list[dict[str, Any]] = []
    if not known:
        lines.append({"change": REAL, "seed": None, "images": None, "by": [seat.real() for seat in jury]})
        again = [seat.again(options.samples) for seat in jury]
        lines.append({"change": AGAIN, "seed": None, "images": None, "by": again})
    what = ", ".join(options.change) or "the recipe"
    for seed in options.seeds:
        config = from_yaml(text, overrides=[*alone, f"seed={seed}", f"sampling.num_images={options.samples}"])
        folder = sampled(config, trained(config, dataset=dataset, work=work), work=work)
        images = SampleSet(folder, options.samples).read(0, options.samples)
        by = [seat.judged(images) for seat in jury]
        lines.append({"change": what, "seed": seed, "images": config.train.num_images, "by": by})
    with options.out.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    print(table(lines))


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inner: int, outer: int, *, stride: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(8, inner), nn.GroupNorm(8, outer)
        self.conv_1 = nn.Conv2d(inner, outer, 3, stride=stride, padding=1)
        self.conv_2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = nn.Conv2d(inner, outer, 1, stride=stride) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        return self.skip(x) + self.conv_2(F.silu(self.norm_2(h)))


class Mixer(nn.Module):
    """A block of a depthwise convolution and one of all channels, each with its residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.across = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        wide = 2 * channels
        self.within = nn.Sequential(nn.Conv2d(channels, wide, 1), nn.GELU(), nn.Conv2d(wide, channels, 1))
        self.norm_1, self.norm_2 = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm_1(x))
        return x + self.within(self.norm_2(x))


def residual(shape: Sequence[int]) -> nn.Module:
    """Residual blocks and the mean over the pixels."""
    layers = [nn.Conv2d(shape[2], 32, 3, padding=1), Block(32, 64, stride=2), Block(64, NUM_FEATURES, stride=2)]
    return nn.Sequential(*layers, nn.GroupNorm(8, NUM_FEATURES), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def dense(shape: Sequence[int]) -> nn.Module:
    """Layers of all pixels, without convolutions."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inner, outer in ((math.prod(shape), 512), (512, 512), (512, NUM_FEATURES)):
        layers += [nn.Linear(inner, outer), nn.LayerNorm(outer), nn.GELU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers[:-1])


def patches(shape: Sequence[int]) -> nn.Module:
    """Patches of 2x2 pixels that are mixed, and their mean."""
    blocks = (Mixer(NUM_FEATURES) for _ in range(3))
    stem = nn.Conv2d(shape[2], NUM_FEATURES, 2, stride=2)
    return nn.Sequential(stem, *blocks, nn.GroupNorm(1, NUM_FEATURES), nn.AdaptiveAvgPool2d(1), nn.Flatten())


BODIES = {"residual": residual, "dense": dense, "patches": patches}


class Judge(nn.Module):
    """A classifier, which is an `Extractor` by the features below its last layer."""

    pixels: Tensor  # mean and standard deviation

    def __init__(self, body: str, shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.name = body
        self.register_buffer("pixels", torch.tensor([0.0, 1.0]))
        self.body, self.head = BODIES[body](shape), nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, images: Images) -> tuple[Tensor, Tensor]:
        """Features and logits of uint8 [N, H, W, C]."""
        x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous().float()
        features = self.body((x - self.pixels[0]) / self.pixels[1])
        return features, self.head(features)

    def extract(self, images: Images) -> Extracted:
        """Features and log probabilities of uint8 [N, H, W, C]."""
        parts = []
        with torch.inference_mode():
            for batch in batches(images, batch_size=500):
                features, logits = self(batch)
                parts.append(Extracted(features.numpy(), F.log_softmax(logits.double(), dim=1).numpy()))
        return joined(parts)


def train_judge(body: str, train: Rows, *, num_classes: int, seed: int, steps: int = STEPS) -> Judge:
    """A judge that is trained on all of these images."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        judge = Judge(body, train.images.shape[1:], num_classes).train()
        judge.pixels.copy_(torch.tensor([train.images.mean(), max(1.0, train.images.std())]))
        optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(train))])
            chosen, order = order[:BATCH].numpy(), order[BATCH:]
            loss = F.cross_entropy(judge(train.images[chosen])[1], torch.from_numpy(train.labels[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


def judges(dataset: str, train: Rows, *, num_classes: int, seed: int, work: str) -> list[Judge]:
    """A judge of each architecture, trained or from `work`."""
    found = []
    for body in BODIES:
        settings = [dataset, body, seed, STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, NUM_FEATURES]
        place = storage.join(work, "judges", f"{body}-{seed}-{storage.digest(settings, 16)}.safetensors")
        if storage.exists(place):
            judge = Judge(body, train.images.shape[1:], num_classes).eval()
            judge.load_state_dict(load_tensors(storage.read_bytes(place)))
        else:
            judge = train_judge(body, train, num_classes=num_classes, seed=seed)
            storage.write_bytes(place, save_tensors(judge.state_dict()))
        found.append(judge)
    return found


@dataclass(frozen=True)
class Seat:
    """A judge, and what it sees in real images."""

    judge: Judge
    scale: float  # of the features, whose variance is 100 in all
    train: Extracted
    test: Extracted
    shares: Array  # of the classes of the training images, [K]
    accuracy: float  # on the test images

    @classmethod
    def of(cls, judge: Judge, train: Rows, test: Rows) -> Seat:
        """A judge who has seen the real images."""
        seen, unseen = judge.extract(train.images), judge.extract(test.images)
        scale = float(np.sqrt(100 / seen.features.astype(np.float64).var(axis=0).sum()))
        counts = np.bincount(train.labels[train.labels >= 0], minlength=seen.log_probabilities.shape[1])
        correct = unseen.log_probabilities.argmax(axis=1) == test.labels
        return cls(judge, scale, seen, unseen, counts / counts.sum(), float(correct[test.labels >= 0].mean()))

    def judged(self, images: Images) -> dict[str, Any]:
        """Figures of uint8 images [N, H, W, C], a third more than there are test images or more."""
        return self._figures(self.judge.extract(images), 3 * len(images) // 4)

    def real(self) -> dict[str, Any]:
        """Figures of the test images."""
        return self._figures(self.test, len(self.test.features))

    def again(self, count: int) -> dict[str, Any]:
        """Figures of training images that are drawn with replacement."""
        drawn = np.random.default_rng(COMMON_SEED).integers(len(self.train.features), size=count)
        extracted = Extracted(self.train.features[drawn], self.train.log_probabilities[drawn])
        return self._figures(extracted, 3 * count // 4)

    def _figures(self, extracted: Extracted, count: int) -> dict[str, Any]:
        features, train = (self.scale * each.features.astype(np.float64) for each in (extracted, self.train))
        reference = FrechetStatistics.of(train)
        seen = extracted.log_probabilities.argmax(axis=1)
        # Class by class, so that every k-th of them have the same shares.
        wanted = np.round(self.shares * count).astype(int)
        chosen = np.concatenate([np.flatnonzero(seen == label)[:most] for label, most in enumerate(wanted)])
        parts = (chosen[number::JACKKNIFE_GROUPS] for number in range(JACKKNIFE_GROUPS))
        groups = [FrechetStatistics.of(features[part]) for part in parts]
        size = min(len(self.test.features), len(chosen))
        some = train[keyed_permutation(COMMON_SEED, epoch=0, size=len(train))[:size]]
        number = len(chosen) // size
        sets = []
        for part in (chosen[first::number] for first in range(number)):
            own = part[np.linspace(0, len(part) - 1, size).astype(int)]
            balls = precision_recall(features[own], some)
            probabilities = extracted.log_probabilities[own]
            sets.append(
                {
                    "equal": frechet_distance(FrechetStatistics.of(features[own]), reference),
                    "confidence": float(np.exp(probabilities.max(axis=1)).mean()),
                    "score": inception_score(probabilities, num_splits=1)[0],
                    "precision": balls["precision"],
                    "recall": balls["recall"],
                }
            )
        counts = np.bincount(seen, minlength=len(self.shares))
        return {
            "judge": self.judge.name,
            "accuracy": self.accuracy,
            "size": size,
            "count": len(features),
            "all": frechet_distance(merged(groups), reference),
            "all_log_std": frechet_jackknife(groups, reference),
            **{key: statistics.fmean(each[key] for each in sets) for key in sets[0]},
            "shares": float(0.5 * np.abs(counts / counts.sum() - self.shares).sum()),
        }


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: the judges, and a row for each recipe with the means over its judges and seeds."""
    groups: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["change"], line["images"]), []).append(line)
    by = lines[0]["by"]
    bodies = [each["judge"] for each in by]
    accuracies = ", ".join(f"{each['judge']} {each['accuracy']:.3f}" for each in by)
    counts = sorted({each["count"] for line in lines if line["seed"] is not None for each in line["by"]})
    samples = " or ".join(f"{count:,}" for count in counts)
    heads = ["recipe", "images", "seeds", "of all", *bodies, *(head for head, _ in FIGURES.values())]
    rows = [
        f"Accuracy on the test images: {accuracies}. `of all` and by each judge: the distance of three quarters of "
        f"{samples} images; the rest but `shares` is of sets of {by[0]['size']:,}.\n",
        f"| {' | '.join(heads)} |",
        "|---" + "|---:" * (len(heads) - 1) + "|",
    ]
    for (change, images), group in groups.items():
        seeds = " ".join(str(line["seed"]) for line in group if line["seed"] is not None)
        cells = [change, "" if images is None else f"{images:,}", seeds]
        if change == REAL:
            cells += [""] * (1 + len(bodies))
        else:
            mean, low, high = interval(group, lines)
            cells.append(f"**{mean:.3f}** ({low:.3f} to {high:.3f})")
            cells += [f"{statistics.fmean(line['by'][at]['all'] for line in group):.3f}" for at in range(len(bodies))]
        for key, (_, shown) in FIGURES.items():
            if change == AGAIN and key != "equal":  # they have been learned
                cells.append("")
                continue
            values = [statistics.fmean(each[key] for each in line["by"]) for line in group]
            spread = f" ({shown} to {shown})".format(min(values), max(values)) if len(values) > 1 else ""
            cells.append(shown.format(statistics.fmean(values)) + spread)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def interval(group: list[dict[str, Any]], lines: list[dict[str, Any]]) -> tuple[float, float, float]:
    """The distance of all samples, a geometric mean over judges and seeds, and its 95 % interval.

    Its standard deviation is that between seeds of a recipe, of all `lines`, or by the jackknife if that is more.
    """

    def log_distance(line: dict[str, Any]) -> float:
        return statistics.fmean(math.log(each["all"]) for each in line["by"])

    recipes: dict[tuple[str, int | None], list[float]] = {}
    for line in lines:
        if line["seed"] is not None:
            recipes.setdefault((line["change"], line["images"]), []).append(log_distance(line))
    freedom = sum(len(values) - 1 for values in recipes.values())
    squares = sum((value - statistics.fmean(values)) ** 2 for values in recipes.values() for value in values)
    # The judges see the same images, so their errors do not average out.
    own = statistics.fmean(each["all_log_std"] for line in group for each in line["by"])
    between, factor = (math.sqrt(squares / freedom), float(student.ppf(0.975, freedom))) if freedom else (0.0, 1.96)
    half = max(factor * between, 1.96 * own) / math.sqrt(len(group))
    mean = math.exp(statistics.fmean(map(log_distance, group)))
    return mean, mean * math.exp(-half), mean * math.exp(half)


if __name__ == "__main__":
    main()
