"""Do generated images help to train a classifier? Classifiers of several sets of images, and one comparison.

All have the same network, number of updates and batch; see `ncsn.evaluation.utility_training` and
`ncsn.evaluation.utility`. The answers of each are stored as it is done, so that a second call trains only those that
are missing.

    <run>/utility/<how>/answers/<arm>-<seed>.npy    classes that a classifier gives the test images
    <run>/utility/<how>/utility.json                the result
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ncsn.evaluation.utility import Comparison, arm_of, compare, require_enough, unbalanced
from ncsn.evaluation.utility_training import RATES, TRIED, VERSION, ClassifierJob, Portion, train_classifier
from ncsn.model.checkpoint import TrainedNetwork, load_checkpoint
from ncsn.model.generate import guide_of
from ncsn.progress import Progress
from ncsn.report.plots import to_png, utility_figure
from ncsn.report.words import utility_sentence
from ncsn.runs import results
from ncsn.runs.layout import INDEX, RunFolder
from ncsn.runs.metrics import Estimate
from ncsn.runs.results import ClassGain, UtilityResult
from ncsn.runs.run import Run
from ncsn.steps.export import uncopied
from ncsn.steps.prepared import Context, Prepared
from ncsn.steps.sample import open_checkpoint, samples_of

HELD_OUT = 5  # one in five images of each class chooses rate and length

REAL, AUGMENTED, GENERATED, RATIO = "real", "augmented", "generated", "ratio-"
OVERSAMPLED, FILLED = "oversampled", "filled"


@dataclass(frozen=True)
class Arm:
    """A set of images to train on."""

    name: str
    parts: Sequence[Portion]
    augmented: bool = True

    @property
    def images(self) -> dict[str, int]:
        """How many real and generated images a pass shows."""
        real, made = ([len(part.rows) for part in self.parts if part.source == of] for of in ("train", "generated"))
        return {"real": sum(real), "generated": sum(made)}


@dataclass(frozen=True)
class Answers:
    """The classifiers of all arms, and what they answered."""

    arms: Sequence[Arm]
    by_arm: Mapping[str, NDArray[np.int64]]  # [seeds, test images]; of each arm, [seeds, test images]
    rate: float
    updates: int
    trials: list[dict[str, Any]]  # that chose both

    def of_arms(self, labels: NDArray[np.int64], *, num_classes: int) -> list[results.Arm]:
        """How good the classifiers of each arm are, by the labels of the test images."""
        return [
            arm_of(arm.name, self.by_arm[arm.name], labels, num_classes=num_classes, **arm.images) for arm in self.arms
        ]

    def compared(self, labels: NDArray[np.int64], *, num_classes: int) -> Comparison:
        """The one comparison, by the labels of the test images."""
        ratios = {name: given for name, given in self.by_arm.items() if name.startswith(RATIO)}
        return compare(self.by_arm[AUGMENTED], ratios, labels, num_classes=num_classes)


def prepare(run: Run, *, checkpoint: str, dataset: str) -> Utility:
    """The step also runs where the config has no section `utility`, if it is asked for alone."""
    config, trained = open_checkpoint(run, checkpoint)
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
    facts, _ = samples_of(own, trained, run.folder)
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
    return Utility(config, key, own, wish, trained, manifest, checkpoint, dataset, uri)


@dataclass(frozen=True)
class Utility(Prepared[UtilityResult]):
    """Generates the images that are missing, trains the classifiers that are missing, and compares."""

    making: Config  # the config with the seed and the classes of these images
    wish: UtilityConfig  # the settings, of a config without the section too
    trained: TrainedNetwork  # that makes the images
    manifest: Manifest  # of the dataset
    checkpoint: str  # URI
    dataset: str  # URI
    uri: str  # folder of the answers and the result

    def work(self, context: Context) -> UtilityResult:
        config, manifest, progress = self.making, self.manifest, context.progress
        names, ratio = manifest.class_names, max(self.wish.ratios)
        labels, test = (
            np.asarray(open_cache(self.dataset, split, as_bytes=True).labels) for split in ("train", "test")
        )
        tested = np.flatnonzero(test >= 0)
        counts = np.array(manifest.class_counts["train"])
        most = np.ceil(ratio * counts).astype(int)
        with cluster_for(config, start=config.compute.max_workers > 1, last_lines=context.last_lines):
            digests = {"dataset.digest": manifest.digest, "checkpoint.digest": self.trained.digest}
            context.tracked.set_tags({**ray_tags(), **digests})
            missing = (counts.max() - counts) * unbalanced(counts)  # to balance the classes
            parts = [
                uncopied(
                    config,
                    self.trained,
                    name,
                    count,
                    checkpoint=self.checkpoint,
                    dataset=self.dataset,
                    context=context,
                )
                for name, count in zip(names, np.maximum(most, missing).astype(int).tolist(), strict=True)
            ]
            job = ClassifierJob(
                dataset=self.dataset,
                generated=[len(part.chosen) for part in parts],
                batch_size=self.wish.batch_size,
                num_classes=len(names),
                mirrors=config.data.horizontal_flip,
                split="test",
                judged=tested,
                place=storage.join(self.uri, "answers"),
                use_gpu=config.compute.use_gpu,
            )
            made = np.concatenate([part.samples.read(0, part.samples.count)[part.chosen] for part in parts])
            answers = train_arms(job, labels, self.wish, made=made, runner=runner_of(config.compute), progress=progress)
        kept = [len(part.chosen) for part in parts]
        found = answers.compared(test[tested], num_classes=len(names))
        if not any(kept):
            found = replace(found, grade="copies", gain=Estimate(0.0, -100.0, 100.0), named=[])
        named = {names[label]: found.classes[label] for label in found.named}
        used = int(np.minimum(kept, most).sum())
        sentence = utility_sentence(found.grade, found.gain, named, used=used, wanted=int(most.sum()))
        result = UtilityResult(
            uri=storage.join(self.uri, "utility.json"),
            plot=storage.join(self.uri, "utility.png"),
            sentence=sentence + _doubt(config, self.trained, context.folder),
            grade=found.grade,
            gain=found.gain,
            chosen=found.chosen,
            named=list(named),
            classes=[
                ClassGain(name, train=int(counts[label]), test=int((test == label).sum()), gain=found.classes[label])
                for label, name in enumerate(names)
            ],
            arms=answers.of_arms(test[tested], num_classes=len(names)),
            seeds=self.wish.seeds,
            updates=answers.updates,
            rate=answers.rate,
            trials=answers.trials,
            checkpoint_digest=self.trained.digest,
            copies=sum(part.copies.copies for part in parts),
            made=sum(part.samples.count for part in parts),
            notes=[*self._notes(answers, test[tested])],
        )
        self._publish(result, context)
        return result

    def _notes(self, answers: Answers, labels: NDArray[np.int64]) -> Iterator[str]:
        by_arm = answers.by_arm
        classes = len(self.manifest.class_names)
        plain = compare(by_arm[AUGMENTED], {REAL: by_arm[REAL]}, labels, num_classes=classes)
        if plain.grade == "helps":
            better = f"{plain.gain.signed} points"
            yield f"real images are better without augmentation: {better}; what is compared has it on both sides"
        if answers.updates == self.wish.updates:
            yield f"classifiers gained until the last of utility.updates = {answers.updates:,}: more may gain more"

    def _publish(self, result: UtilityResult, context: Context) -> None:
        """Write the files of the result, and tell MLflow."""
        tracked, gain = context.tracked, result.gain
        storage.write_json(result.uri, storage.relative_uris(result.plain(), context.folder.root), indent=1)
        storage.write_bytes(result.plot, to_png(utility_figure(result)))
        metrics = {"utility/gain": gain.value, "utility/gain_low": gain.low, "utility/gain_high": gain.high}
        metrics |= {f"utility/{arm.name}": arm.balanced_accuracy.value for arm in result.arms}
        for each in (tracked, tracked.parent):
            each.log_metrics(metrics)
        tracked.parent.set_tags({"utility": result.sentence})
        for file in (result.uri, result.plot):
            tracked.log_file(file)


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


def train_arms(
    job: ClassifierJob,
    labels: NDArray[np.int64],
    wish: UtilityConfig,
    *,
    made: Images,
    runner: Runner,
    progress: Progress,
) -> Answers:
    """Train the classifiers of all arms that are missing, on training images of these labels and those `made`.

    These are the generated images of all classes, one class after the other.
    """

    def answers_of(jobs: Sequence[ClassifierJob], unit: str) -> list[NDArray[np.int64]]:
        """The answers of each classifier; only those that are not stored yet are trained."""
        missing = [job for job in jobs if not storage.exists(job.place)]
        total, left = (sum(job.lengths[-1] for job in each) for each in (jobs, missing))
        progress.start(total, unit, done=total - left)
        if missing:  # else the images need not go to the nodes
            told: Iterator[tuple[ClassifierJob, int]] = runner(partial(train_classifier, made=made), missing, gpu=True)
            for _, updates in told:
                progress.advance(updates)
        return [storage.read_array(job.place) for job in jobs]

    rate, updates, trials = _rate_and_length(job, labels, wish, answers_of=answers_of)
    arms = list(_arms(labels, job.generated, wish.ratios))
    jobs = [
        replace(
            job,
            rate=rate,
            lengths=(updates,),
            parts=arm.parts,
            augmented=arm.augmented,
            seed=seed,
            place=storage.join(job.place, f"{arm.name}-{seed}.npy"),
        )
        for arm in arms
        for seed in range(wish.seeds)
    ]
    found = np.reshape(answers_of(jobs, "updates"), (len(arms), wish.seeds, -1))
    return Answers(arms, dict(zip([arm.name for arm in arms], found, strict=True)), rate, updates, trials)


def _arms(labels: NDArray[np.int64], generated: Sequence[int], ratios: Sequence[float]) -> Iterator[Arm]:
    """The arms for training images of these labels, and this number of generated images of each class."""
    by_class = [np.flatnonzero(labels == label) for label in range(len(generated))]
    counts, starts = np.array([len(own) for own in by_class]), np.cumsum([0, *generated])

    def first(wanted: NDArray[np.int64]) -> Portion:
        """The first generated images of each class, as far as they are there."""
        ends = np.minimum(starts[:-1] + wanted, starts[1:])
        return Portion("generated", np.concatenate([*map(np.arange, starts[:-1], ends)]), draw=1)

    real = Portion("train", np.concatenate(by_class), draw=0)
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
            again.append(Portion("train", np.concatenate(rows), draw=1 + k))
        yield Arm(OVERSAMPLED, [real, *again])
        yield Arm(FILLED, [real, first(missing)])


def _rate_and_length(
    job: ClassifierJob,
    labels: NDArray[np.int64],
    wish: UtilityConfig,
    *,
    answers_of: Callable[[Sequence[ClassifierJob], str], list[NDArray[np.int64]]],
) -> tuple[float, int, list[dict[str, Any]]]:
    """The rate and the number of updates of all arms, and every trial.

    Real images with augmentation alone decide, by a part of the training images: the best mean over classes, and of
    equal ones the shortest training.
    """
    order = np.random.default_rng(COMMON_SEED).permutation(len(labels))
    by_class = [order[labels[order] == label] for label in range(job.num_classes)]
    judged = np.sort(np.concatenate([own[: math.ceil(len(own) / HELD_OUT)] for own in by_class]))
    rest = Portion("train", np.setdiff1d(np.flatnonzero(labels >= 0), judged), draw=0)
    lengths = tuple(sorted({max(1, wish.updates // part) for part in (8, 4, 2, 1)}))
    job = replace(job, generated=(), parts=[rest], lengths=lengths, split="train", judged=judged)
    jobs = [
        replace(job, rate=rate, seed=seed, place=storage.join(job.place, f"trial-{rate:g}-{seed}.npy"))
        for rate in RATES
        for seed in range(TRIED)
    ]
    found = answers_of(jobs, "trial updates")
    right = np.reshape(found, (len(RATES), TRIED, len(lengths), len(judged))) == labels[judged]
    balanced = np.mean(
        [right[..., labels[judged] == label].mean(axis=(1, 3)) for label in range(len(by_class))], axis=0
    )
    trials = [
        {"rate": rate, "updates": length, "balanced_accuracy": 100 * float(balanced[r, k])}
        for r, rate in enumerate(RATES)
        for k, length in enumerate(lengths)
    ]
    best = max(trials, key=lambda trial: (trial["balanced_accuracy"], -trial["updates"]))
    return float(best["rate"]), int(best["updates"]), trials
