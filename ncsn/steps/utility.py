"""Do generated images help to train a classifier? Classifiers of several sets of images, and one comparison.

All have the same network, number of updates and batch; see `ncsn.evaluation.learner` and `ncsn.evaluation.utility`. The
answers of each are stored as it is done, so that a second call trains only those that are missing.

    <run>/utility/<how>/answers/<arm>-<seed>.npy    classes that a classifier gives the test images
    <run>/utility/<how>/utility.json                the result
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncsn import storage
from ncsn.config import Config
from ncsn.config.schema import UtilityConfig
from ncsn.core.keyed_random import COMMON_SEED
from ncsn.data.format import Manifest, load_manifest
from ncsn.data.training_images import open_cache
from ncsn.distributed.cluster import cluster_for, ray_tags
from ncsn.distributed.ray_calls import runner_of
from ncsn.errors import UserError
from ncsn.evaluation.extractors import Images
from ncsn.evaluation.features import Runner
from ncsn.evaluation.learner import RATES, TRIED, VERSION, Lesson, Part, learn
from ncsn.evaluation.utility import compare, figures, require_enough, unbalanced
from ncsn.model.checkpoint import TrainedNetwork, load_checkpoint
from ncsn.model.generate import guide_of
from ncsn.progress import Progress
from ncsn.report.plots import to_png, utility_figure
from ncsn.report.words import shown_gain, utility_sentence
from ncsn.runs.folder import INDEX, Run, RunFolder
from ncsn.steps.export import uncopied
from ncsn.steps.results import Context, Prepared, UtilityResult
from ncsn.steps.sample import opened, place_of

HELD_OUT = 5  # one in five images of each class chooses rate and length

REAL, AUGMENTED, GENERATED, RATIO = "real", "augmented", "generated", "ratio-"
OVERSAMPLED, FILLED = "oversampled", "filled"


@dataclass(frozen=True)
class Arm:
    """A set of images to train on."""

    name: str
    parts: Sequence[Part]
    augmented: bool = True

    @property
    def images(self) -> dict[str, int]:
        """How many real and generated images a pass shows."""
        real, made = ([len(part.rows) for part in self.parts if part.source == of] for of in ("train", "generated"))
        return {"real": sum(real), "generated": sum(made)}


@dataclass(frozen=True)
class Asked:
    """The classifiers of all arms, and what they answered."""

    arms: Sequence[Arm]
    answers: Mapping[str, NDArray[np.int64]]  # of each arm, [seeds, test images]
    rate: float
    updates: int
    trials: list[dict[str, Any]]  # that chose both

    def compared(self, labels: NDArray[np.int64], *, num_classes: int) -> dict[str, Any]:
        """The one comparison, by the labels of the test images."""
        ratios = {name: given for name, given in self.answers.items() if name.startswith(RATIO)}
        return compare(self.answers[AUGMENTED], ratios, labels, num_classes=num_classes)


def prepare(run: Run, *, checkpoint: str, dataset: str) -> Prepared[UtilityResult]:
    """The step also runs where the config has no section `utility`, if it is asked for alone."""
    config, trained = opened(run, checkpoint)
    manifest, wish = load_manifest(dataset), config.utility or UtilityConfig()
    if trained.classes is None:
        reason = "is null: this model was told no classes, which a classifier would tell apart"
        raise UserError("data.num_classes", reason, hint="set it, and train again", value=config.data.num_classes)
    if manifest.digest != trained.dataset_digest:
        reason = f"{trained.digest} was trained on {trained.dataset_digest[:8]}, not on {manifest.digest[:8]}"
        hint = "it may have seen the test images of other data: give the dataset that it was trained on"
        raise UserError("--dataset", reason, hint=hint, value=dataset)
    require_enough(manifest)
    sampling = config.sampling.model_copy(update={"seed": wish.seed, "label": "balanced"})
    own = config.model_copy(update={"sampling": sampling})
    facts, _ = place_of(own, trained, run.folder)
    key = {
        "checkpoint": trained.digest,
        "dataset": manifest.digest,
        **facts,
        "utility": wish.model_dump(mode="json"),
        "mirrors": config.data.horizontal_flip,
        "version": VERSION,
    }
    of_answers = key | {"utility": wish.model_dump(mode="json", exclude={"seeds"})}  # so that more seeds add to them
    uri = storage.join(run.folder.utility, storage.digest(of_answers, 12))
    work = partial(utility, own, wish, trained, manifest, checkpoint, dataset, uri)
    return Prepared(config, key, work, lambda result: [result.uri, result.plot])


def utility(
    config: Config, wish: UtilityConfig, trained: TrainedNetwork, manifest: Manifest, checkpoint: str, dataset: str,
    uri: str, context: Context,
) -> UtilityResult:  # fmt: skip
    """Generate the images that are missing, train the classifiers that are missing, and compare."""
    progress, tracked = context.progress, context.tracked
    labels, test = (np.asarray(open_cache(dataset, split, as_bytes=True).labels) for split in ("train", "test"))
    counts, tested, names = np.array(manifest.class_counts["train"]), np.flatnonzero(test >= 0), manifest.class_names
    with cluster_for(config, start=config.compute.max_workers > 1, last_lines=context.last_lines):
        tracked.set_tags({**ray_tags(), "dataset.digest": manifest.digest, "checkpoint.digest": trained.digest})
        missing = (counts.max() - counts) * unbalanced(counts)  # to balance the classes
        wanted = np.maximum(np.ceil(max(wish.ratios) * counts), missing).astype(int).tolist()
        parts = [
            uncopied(config, trained, name, count, checkpoint=checkpoint, dataset=dataset, context=context)
            for name, count in zip(names, wanted, strict=True)
        ]
        lesson = Lesson(
            dataset=dataset,
            generated=[len(part.chosen) for part in parts],
            batch_size=wish.batch_size,
            num_classes=len(names),
            mirrors=config.data.horizontal_flip,
            split="test",
            asked=tested,
            place=storage.join(uri, "answers"),
            use_gpu=config.compute.use_gpu,
        )
        made = np.concatenate([part.samples.read(0, part.samples.count)[part.chosen] for part in parts])
        asked = ask(lesson, labels, wish, made=made, runner=runner_of(config.compute), progress=progress)
    test = test[tested]
    found = asked.compared(test, num_classes=len(names))
    rows = [
        {"name": arm.name, **arm.images, **figures(asked.answers[arm.name], test, num_classes=len(names))}
        for arm in asked.arms
    ]
    kept, most = [len(part.chosen) for part in parts], np.ceil(max(wish.ratios) * counts).astype(int)
    if not any(kept):
        found |= {"grade": "copies", "gain": {"value": 0.0, "low": -100.0, "high": 100.0}, "named": []}
    gain, notes = found["gain"], list[str]()
    alone = compare(asked.answers[AUGMENTED], {REAL: asked.answers[REAL]}, test, num_classes=len(names))
    if alone["grade"] == "helps":
        better = f"{shown_gain(alone['gain'])} points"
        notes.append(f"real images are better without augmentation: {better}; what is compared has it on both sides")
    if asked.updates == wish.updates:
        notes.append(f"classifiers gained until the last of utility.updates = {wish.updates:,}: more may gain more")
    named = {names[label]: found["classes"][label] for label in found["named"]}
    used = int(np.minimum(kept, most).sum())
    sentence = utility_sentence(found["grade"], gain, named, used=used, wanted=int(most.sum()))
    sentence += _doubt(config, trained, context.folder)
    result = UtilityResult(
        uri=storage.join(uri, "utility.json"),
        plot=storage.join(uri, "utility.png"),
        sentence=sentence,
        grade=found["grade"],
        gain=gain,
        chosen=found["chosen"],
        named=list(named),
        classes=[
            {"name": name, "train": int(counts[label]), "test": int((test == label).sum()), "gain": gained}
            for label, (name, gained) in enumerate(zip(names, found["classes"], strict=True))
        ],
        arms=rows,
        seeds=wish.seeds,
        updates=asked.updates,
        rate=asked.rate,
        trials=asked.trials,
        checkpoint_digest=trained.digest,
        copies=sum(part.copies.copies for part in parts),
        made=sum(part.samples.count for part in parts),
        notes=notes,
    )
    storage.write_json(result.uri, storage.relative_uris(asdict(result), context.folder.root), indent=1)
    storage.write_bytes(result.plot, to_png(utility_figure(asdict(result))))
    metrics = {f"utility/gain{end}": gain[key] for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))}
    for each in (tracked, tracked.parent):
        each.log_metrics(metrics | {f"utility/{row['name']}": row["balanced_accuracy"]["value"] for row in rows})
    tracked.parent.set_tags({"utility": result.sentence})
    for file in (result.uri, result.plot):
        tracked.log_file(file)
    return result


def _doubt(config: Config, trained: TrainedNetwork, folder: RunFolder) -> str:
    """What the sentence adds where weights or guide come from a training on images that these cannot vouch for."""
    doubt = "; its weights or its guide's began on other images, which may hold these test images"
    others = [guide] if (guide := guide_of(trained, config.sampling)) else []
    if config.train.init_from is not None:
        if not storage.exists(storage.join(folder.start, INDEX)):  # of a version
            return doubt
        others.append(load_checkpoint(folder.start))
    unknown = any(each.dataset_digest != trained.dataset_digest or each.config.train.init_from for each in others)
    return doubt if unknown else ""


def ask(
    lesson: Lesson, labels: NDArray[np.int64], wish: UtilityConfig, *, made: Images, runner: Runner, progress: Progress
) -> Asked:
    """Train the classifiers of all arms that are missing, on training images of these labels and those `made`.

    These are the generated images of all classes, one class after the other.
    """

    def learned(lessons: Sequence[Lesson], unit: str) -> list[NDArray[np.int64]]:
        """The answers of each classifier; only those that are not stored yet are trained."""
        missing = [lesson for lesson in lessons if not storage.exists(lesson.place)]
        total, left = (sum(lesson.lengths[-1] for lesson in each) for each in (lessons, missing))
        progress.start(total, unit, done=total - left)
        if missing:  # else the images need not go to the nodes
            told: Iterator[tuple[Lesson, int]] = runner(partial(learn, made=made), missing, gpu=True)
            for _, updates in told:
                progress.advance(updates)
        return [storage.read_array(lesson.place) for lesson in lessons]

    rate, updates, trials = _rate_and_length(lesson, labels, wish, learned=learned)
    arms = list(_arms(labels, lesson.generated, wish.ratios))
    lessons = [
        replace(
            lesson,
            rate=rate,
            lengths=(updates,),
            parts=arm.parts,
            augmented=arm.augmented,
            seed=seed,
            place=storage.join(lesson.place, f"{arm.name}-{seed}.npy"),
        )
        for arm in arms
        for seed in range(wish.seeds)
    ]
    found = np.reshape(learned(lessons, "updates"), (len(arms), wish.seeds, -1))
    return Asked(arms, dict(zip([arm.name for arm in arms], found, strict=True)), rate, updates, trials)


def _arms(labels: NDArray[np.int64], generated: Sequence[int], ratios: Sequence[float]) -> Iterator[Arm]:
    """The arms for training images of these labels, and this number of generated images of each class."""
    by_class = [np.flatnonzero(labels == label) for label in range(len(generated))]
    counts, starts = np.array([len(own) for own in by_class]), np.cumsum([0, *generated])

    def first(wanted: NDArray[np.int64]) -> Part:
        """The first generated images of each class, as far as they are there."""
        ends = np.minimum(starts[:-1] + wanted, starts[1:])
        return Part("generated", np.concatenate([*map(np.arange, starts[:-1], ends)]), draw=1)

    real = Part("train", np.concatenate(by_class), draw=0)
    yield Arm(REAL, [real], augmented=False)
    yield Arm(AUGMENTED, [real])
    if starts[-1]:
        yield Arm(GENERATED, [first(np.ceil(max(ratios) * counts).astype(np.int64))])
    for ratio in sorted(set(ratios)):
        yield Arm(f"{RATIO}{ratio:g}", [real, first(np.ceil(ratio * counts).astype(np.int64))])
    if unbalanced(counts):
        missing, again = counts.max() - counts, []
        for k in range(1, math.ceil(counts.max() / counts.min())):  # image after image, class by class
            rows = [own[: max(0, lack - (k - 1) * len(own))] for own, lack in zip(by_class, missing, strict=True)]
            again.append(Part("train", np.concatenate(rows), draw=1 + k))
        yield Arm(OVERSAMPLED, [real, *again])
        yield Arm(FILLED, [real, first(missing)])


def _rate_and_length(
    lesson: Lesson,
    labels: NDArray[np.int64],
    wish: UtilityConfig,
    *,
    learned: Callable[[Sequence[Lesson], str], list[NDArray[np.int64]]],
) -> tuple[float, int, list[dict[str, Any]]]:
    """The rate and the number of updates of all arms, and every trial.

    Real images with augmentation alone decide, by a part of the training images: the best mean over classes, and of
    equal ones the shortest training.
    """
    order = np.random.default_rng(COMMON_SEED).permutation(len(labels))
    by_class = [order[labels[order] == label] for label in range(lesson.num_classes)]
    asked = np.sort(np.concatenate([own[: math.ceil(len(own) / HELD_OUT)] for own in by_class]))
    rest = Part("train", np.setdiff1d(np.flatnonzero(labels >= 0), asked), draw=0)
    lengths = tuple(sorted({max(1, wish.updates // part) for part in (8, 4, 2, 1)}))
    lesson = replace(lesson, generated=(), parts=[rest], lengths=lengths, split="train", asked=asked)
    lessons = [
        replace(lesson, rate=rate, seed=seed, place=storage.join(lesson.place, f"trial-{rate:g}-{seed}.npy"))
        for rate in RATES
        for seed in range(TRIED)
    ]
    found = learned(lessons, "trial updates")
    right = np.reshape(found, (len(RATES), TRIED, len(lengths), len(asked))) == labels[asked]
    balanced = np.mean([right[..., labels[asked] == label].mean(axis=(1, 3)) for label in range(len(by_class))], axis=0)
    trials = [
        {"rate": rate, "updates": length, "balanced_accuracy": 100 * float(balanced[r, k])}
        for r, rate in enumerate(RATES)
        for k, length in enumerate(lengths)
    ]
    best = max(trials, key=lambda trial: (trial["balanced_accuracy"], -trial["updates"]))
    return float(best["rate"]), int(best["updates"]), trials
