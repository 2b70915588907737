"""Scores, results, costs and origins of a run in words, for the page, the model card, the command line and KFP alike.

Imports no torch, because the command line uses it.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ncsn.config import Config, continues, from_yaml, to_yaml
from ncsn.config.schema import DataConfig
from ncsn.data.format import Manifest
from ncsn.errors import UserError
from ncsn.evaluation.copies import Copies
from ncsn.runs.layout import RunFolder, addresses, images_seen_at
from ncsn.runs.metrics import (
    GRADES,
    INTERVAL,
    MEANINGS,
    UTILITY,
    Estimate,
    Meaning,
    Reading,
    read_metrics,
    shown_reading,
    with_interval,
)
from ncsn.runs.record import Cost, read_result, total_cost
from ncsn.runs.results import Arm, SampleResult, TrainResult
from ncsn.runs.run import state_to_continue

LEAST_SLOWDOWN = 1.25  # that is told
# Metrics that the page of a run shows at once; it folds the others.
MAIN = ("excess", "score", "fid", "class_agreement", "precision", "recall", "copies", "closeness")
ENOUGH_IMAGES = 10_000  # for a Fréchet distance to compare models of different diversity


class Score(NamedTuple):
    """A metric of the samples next to that of real images."""

    metric: str
    name: str  # in MLflow
    meaning: Meaning
    value: float
    text: str  # the value, and of a distance its 95 % interval over other samples of as many images
    real: float | None
    real_text: str  # empty if there is none
    interval: tuple[float, ...] = ()  # its ends, of a distance
    real_interval: tuple[float, ...] = ()

    @property
    def bars(self) -> dict[str, Any]:
        """What is drawn of both values: places on an axis in percent of its length, and the texts of the axis."""
        numbers = [self.value, *self.interval, *self.real_interval, *([] if self.real is None else [self.real])]
        low, high = min(0.0, *numbers), max(0.0, *numbers)
        unit = 10.0 ** math.floor(math.log10(max(-low, high) or 1.0)) / 2  # the axis ends at round numbers
        low, high = unit * math.floor(low / unit), unit * math.ceil(high / unit) or (0.0 if low else unit)

        def at(*values: float) -> list[float]:
            return [round(100 * (value - low) / (high - low), 1) for value in values]

        marks = [low, *([0.0] if 20 < at(0.0)[0] < 80 else []), high]  # zero has no room beside an end
        texts = [f"{100 * mark:,.4g} %" if self.metric == "excess" else f"{mark:,.4g}" for mark in marks]
        return {
            "axis": list(zip(at(*marks), texts, strict=True)),
            "bar": at(min(0.0, self.value), max(0.0, self.value)),
            "interval": at(*self.interval),
            "real": [] if self.real is None else at(self.real),
            "real_interval": at(*self.real_interval),
        }


SCORES_HEAD = ("score", "generated", "real images")  # of a table of name, text and real text of each


def score_rows(evaluation: Mapping[str, Any]) -> list[Score]:
    """A row for each metric of an evaluation."""
    generated, real = read_metrics(evaluation["metrics"]), read_metrics(evaluation["real_metrics"])
    rows = []
    for metric, meaning in MEANINGS.items():
        if metric in generated:
            own, other = generated[metric], real.get(metric)
            text = meaning.text.format(reference=reference_images(own.split))
            of_real = None if other is None else other.value
            number = f" of {other.num_images:,}" if other and other.num_images != own.num_images else ""
            texts = shown_reading(metric, generated), of_real, shown_reading(metric, real) + number
            ends = [tuple(of[metric + end].value for end in INTERVAL if metric + end in of) for of in (generated, real)]
            rows.append(Score(metric, own.name, meaning._replace(text=text), own.value, *texts, *ends))
    return rows


def reference_images(split: str) -> str:
    """What samples are compared with, in words."""
    return "the training images" if split == "train" else f"the {split} images"


# Shares of the distance of noise with the mean and covariance of the training pixels: see docs/evaluation.md.
CLOSE, FAR = 0.05, 0.1


def verdict_of(metrics: Mapping[str, float], real_metrics: Mapping[str, float], *, copies: Copies) -> tuple[str, str]:
    """How near samples are to real images, by the metrics of an evaluation: a key of `GRADES`, a line with the numbers.

    The verdict is by the whole 95 % interval of the distance beyond real images, and by the copies that chance does not
    explain: more images make it surer, not stricter.
    """
    samples, real = read_metrics(metrics), read_metrics(real_metrics)
    grade = "copied" if copies.more_than_chance else _fidelity(samples)
    number = real["fid"].num_images
    text = (
        f"{samples['excess'].num_images:,} images made: {GRADES[grade]}. Their distance exceeds that of real images by "
        f"{shown_reading('excess', samples)} of that of noise; Fréchet distance of {number:,} each: samples "
        f"{shown_reading('fid', samples)}, real images {shown_reading('fid', real)}. {copies}"
    )
    return grade, text


def _fidelity(samples: Mapping[str, Reading]) -> str:
    """The key of `GRADES`, whatever is copied."""
    low, high = samples["excess_low"].value, samples["excess_high"].value
    if high < CLOSE:
        return "close"
    return "far" if low > FAR else "short" if low > 0 else "unsure"


def answers(evaluation: Mapping[str, Any], utility: str) -> list[Fact]:
    """The three questions of synthetic data; `utility` is the sentence of the step, empty without."""
    samples = read_metrics(evaluation["metrics"])
    beyond = f"distance beyond real images {shown_reading('excess', samples)} of that of noise"
    return [
        Fact("Fidelity", f"{GRADES[_fidelity(samples)]}; {beyond}"),
        Fact("Privacy", str(Copies(**evaluation["audit"]["copies"]))),
        Fact("Utility", utility or "not asked: the config has no section utility"),
    ]


ARMS = {
    "real": "real",
    "augmented": "real, augmented",
    "generated": "generated",
    "oversampled": "balanced by repeating real",
    "filled": "balanced by generated",
}


def arm_label(name: str) -> str:
    """A set of images to train on, in words."""
    return ARMS.get(name) or f"with {name.removeprefix('ratio-')} generated"


ARMS_HEAD = ("trained on", "real", "generated", "balanced accuracy %", "accuracy %", "macro F1 %")


def arm_lines(arms: Sequence[Arm]) -> list[tuple[str, ...]]:
    """Text for each set of images of the result of `utility`."""
    return [
        (
            arm_label(arm.name),
            f"{arm.real:,}",
            f"{arm.generated:,}",
            str(arm.balanced_accuracy),
            str(arm.accuracy),
            str(arm.macro_f1),
        )
        for arm in arms
    ]


def utility_sentence(grade: str, gain: Estimate, named: Mapping[str, Estimate], *, used: int, wanted: int) -> str:
    """What a comparison of classifiers says of generated images; `named` are the gains of classes that changed.

    Of the images `wanted` for the largest ratio, `used` are no copies.
    """
    if grade == "copies":
        return f"Generated images {UTILITY[grade]}"
    least = f"{max(-gain.low, gain.high):.2g}".replace("1e+02", "100")
    none = f"no difference of {least} points or more, the least that could be seen here"
    value, _, ends = gain.signed.partition(" ")
    verdict = none if grade == "same" else f"they {UTILITY[grade]}"
    text = f"{value} points of balanced accuracy over augmentation alone {ends}: {verdict}"
    if changed := [f"{name} ({round(each.value, 1):+g})" for name, each in named.items()]:
        text += f"; changed most: class {', '.join(changed[:3])}"
    if used < wanted:
        text += f"; {wanted - used:,} of {wanted:,} could not be added, since they copy training images"
    return f"Generated images: {text}; this speaks of this generator and these training images"


def next_step(grade: str, config: Config, folder: RunFolder) -> tuple[str, str]:
    """What to do after a verdict, a command and what that makes: more images, or longer or shorter training."""
    length, again = config.train.num_images, folder.options(config)
    new = " ".join([f"ncsn run --config {shlex.quote(folder.config)}", *addresses(config)])
    fresh = f"{new} --set train.continue_from=null" if config.train.continue_from else new
    trained = read_result(folder, TrainResult)
    seen = length if trained is None else trained.images_seen
    longest = max(length, seen)
    if grade == "close":
        return f"ncsn sample {again} --set sampling.seed={config.sampling.seed + 1}", "other images"
    if grade == "copied":
        name = f" --run {config.name}-{seen // 2}" if continues(config) else ""
        return f"{fresh}{name} --set train.num_images={seen // 2}", "a new run, half as long"
    if seen < length:
        return f"ncsn run {again}", f"this run, trained to its {length:,} images"
    if continues(config):
        return (
            f"ncsn run {again} --set train.num_images={2 * longest}",
            "this run, trained twice as long",
        )
    if not config.loss.learns_score:
        return f"{new} --set train.num_images={2 * length}", "a new run from the same trained network, twice as long"
    settings = [f"train.continue_from={folder.run}", f"train.num_images={2 * length}"]
    with suppress(UserError):  # its state is gone, or its EMA depends on the length
        longer = from_yaml(to_yaml(config), overrides=[*settings, f"storage.root={folder.root}"])
        begins = images_seen_at(state_to_continue(longer))
        what = f"a new run, twice as long, from {begins:,} images on, before the learning rate of this one fell"
        return " --set ".join([new, *settings]), what
    what = f"a new run on {length:,} images more, from these EMA weights: the learning rate of this one has ended"
    return f"{fresh} --set train.init_from={folder.run}", what


EXTRACTORS = {  # as the subjects of a sentence
    "classifier": "A classifier trained on the same labeled images",
    "clusters": "A network trained to tell clusters of similar training images apart",
    "inception": "The 2015 Inception network, which published scores use,",
    "dinov2": "DINOv2 ViT-L/14, which published FD-DINOv2 values use,",
}


def few_samples(metric: str) -> str:
    """What this metric cannot compare, in a sentence, if it is a Fréchet distance of few samples; else empty."""
    kind, reading = read_metrics({metric: 0.0}).popitem()
    if kind != "fid" or reading.num_images >= ENOUGH_IMAGES:
        return ""
    return (
        f"The Fréchet distance of {reading.num_images:,} samples favors models of little diversity. It may rank "
        "checkpoints of one run, but not what changes diversity: guidance, churn, or the length of the EMA. For "
        f"these use {ENOUGH_IMAGES:,} samples or more, or the kernel distance."
    )


CLASSES_HEAD = ("class", "images", "classified as requested", "real test images", "kernel distance")


def class_lines(classes: Mapping[str, Any], *, most: int) -> list[tuple[str, ...]]:
    """Text for each class of the `classes` of an evaluation, or for the `most` that agree least."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = list(zip(classes["table"], classes["real_table"], strict=True))
    if len(lines) > most:
        lines = sorted(lines, key=lambda pair: (pair[0]["agreement"] is None, pair[0]["agreement"] or 0.0))[:most]
    return [
        (
            line["name"][:30],
            f"{line['num_images']:,}",
            shown(line["agreement"], ".1%"),
            shown(real["agreement"], ".1%"),
            shown(line["kid"], ".4g"),
        )
        for line, real in lines
    ]


def candidates_head(metric: str) -> tuple[str, ...]:
    """Of the table of `candidate_lines`."""
    return ("images seen", metric, "weights")


def shown_score(row: Mapping[str, Any]) -> str:
    """That of a candidate."""
    return "not finite" if row["value"] is None else with_interval(row["value"], row["low"], row["high"])


def candidate_lines(candidates: Sequence[Mapping[str, Any]], *, most: int) -> list[tuple[str, ...]]:
    """Text for each of the best candidates of `ncsn select`."""
    ranked = sorted(candidates, key=lambda row: (row["value"] is None, row["value"] or 0.0, row["images_seen"]))
    return [(f"{row['images_seen']:,}", shown_score(row), row["digest"]) for row in ranked[:most]]


MINUTE, HOUR, DAY = 60, 3600, 86400


class Fact(NamedTuple):
    """A line of a list: a name, and an ID, an address or a version."""

    label: str
    value: str
    link: str = ""


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min`, `2.1 h` or `4.0 days`."""
    if seconds < 2 * MINUTE:
        return f"{seconds:,.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:,.1f} min"
    return f"{seconds / HOUR:,.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:,.1f} days"


def terms(data: DataConfig, manifest: Manifest) -> str:
    """The license of the images, whose they are and where from: as the config says, else their manifest."""
    owner, url = data.owner or manifest.owner, data.url or manifest.url
    owned, found = f"owner: {owner}" if owner else "", f"from {url}" if url else ""
    return "; ".join(filter(None, (data.license or manifest.license, owned, found)))


def slowdown(cores: int) -> float:
    """How many times longer work on this many cores takes beside what others run on this machine now."""
    own = min(time.process_time() / MINUTE, cores)  # of this process in the load, a mean over the last minute
    others = max(0.0, os.getloadavg()[0] - own)
    return max(1.0, (cores + others) / (os.cpu_count() or 1))


def takes(seconds: float, *, times: float) -> str:
    """An estimate for idle cores, and beside it that for a `slowdown`."""
    now = f", about {duration(times * seconds)} at this load" if times >= LEAST_SLOWDOWN else ""
    return f"{duration(seconds)} on idle cores{now}"


def cost_line(costs: Collection[Cost]) -> str:
    """What some steps reserved, together; empty without any."""
    if not costs:
        return ""
    total = total_cost(costs)
    gpu = f" · {duration(total.gpu_hours * HOUR)} of GPUs" if total.gpu_hours else ""
    return f"{duration(total.seconds)} · {duration(total.cpu_hours * HOUR)} of CPU cores{gpu}"


def cost_facts(spent: Mapping[str, Cost], *, num_images: int) -> Iterator[Fact]:
    """What the run reserved, and 1,000 more images would; `num_images` are those of the sample step."""
    if not spent:
        return
    # The times of the steps above are those of their last attempt, without its startup.
    yield Fact("Reserved, with startup and earlier attempts", cost_line(spent.values()))
    if SampleResult.step in spent and num_images:
        scaled = Cost(*(1000 / num_images * amount for amount in spent[SampleResult.step]))
        yield Fact("Per 1,000 images", cost_line([scaled]))


# The other tags are versions of packages, or for MLflow alone.
TAGS = {
    "mlflow.source.git.commit": "Git commit",
    "mlflow.source.git.dirty": "Edited since that commit",
    "ncsn.code.digest": "Code digest",
    "mlflow.docker.image.uri": "Image",
    "train.computed_on": "Trained on",
    "kfp.pipeline_run_id": "KFP run",
    "ray.submission_id": "Ray submission",
    "ray.job_id": "Ray job",
    "ray.session": "Ray session",
    "mlflow.user": "Started by",
}
LINKS = {"kfp.pipeline_run_id": "kfp.pipeline_run_url", "ray.submission_id": "ray.dashboard_url"}
VERSION = ".version"


def tag_facts(runs: Sequence[Mapping[str, str]]) -> list[Fact]:
    """Facts from the tags of MLflow runs; where steps have different values, all of them in order."""
    facts, values = list[Fact](), dict[str, list[str]]()
    for tags in runs:
        for tag, value in tags.items():
            if value not in (*values.setdefault(tag, []), ""):
                values[tag].append(value)
    for tag, label in TAGS.items():
        if found := values.get(tag):
            link, *_ = values.get(LINKS.get(tag, "")) or [""]
            # A tag may hold anything; only an address of a page becomes a link.
            facts.append(Fact(label, ", ".join(found), link if link.startswith(("http://", "https://")) else ""))
    if shown := [f"{tag.removesuffix(VERSION)} {', '.join(values[tag])}" for tag in values if tag.endswith(VERSION)]:
        facts.append(Fact("Versions", " · ".join(shown)))
    return facts
