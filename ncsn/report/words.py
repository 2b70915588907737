"""Metrics, results and costs in words. Imports no torch, because the command line uses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ncsn.report.page import Fact, ScoreRow, Tile

if TYPE_CHECKING:
    from ncsn.data.format import Manifest

REAL = "eval/real_"
GENERATED = "eval/"


class Meaning(NamedTuple):
    """What a metric says."""

    label: str
    text: str
    better: Literal["higher", "lower", ""]


# In the order in which the page shows them.
MEANINGS: Mapping[str, Meaning] = {
    "score": Meaning(
        "Score",
        "The Inception Score formula: high when each image clearly shows one class and all classes occur. Ranges from "
        "1 to the number of classes.",
        "higher",
    ),
    "fid": Meaning(
        "Fréchet distance",
        "Distance between the features of these images and those of the training images. Fewer images give a larger "
        "value.",
        "lower",
    ),
    "kid": Meaning(
        "Kernel distance",
        "Distance to the training images that does not depend on the number of images. It averages zero for real "
        "images and can be negative.",
        "lower",
    ),
    "precision": Meaning(
        "Precision", "Share of these images whose features fall among those of the real images.", "higher"
    ),
    "recall": Meaning("Recall", "Share of the real images whose features fall among those of these images.", "higher"),
    "density": Meaning(
        "Density",
        "How densely real images surround these in feature space; about 1 for real images. Like precision, but less "
        "sensitive to outliers.",
        "higher",
    ),
    "coverage": Meaning(
        "Coverage",
        "Share of the real images that have one of these images nearby in feature space. Like recall, but less "
        "sensitive to outliers.",
        "higher",
    ),
    "class_agreement": Meaning("Class agreement", "Share of the images seen as the class asked for.", "higher"),
    "class_kid": Meaning("Kernel distance by class", "Its mean over the classes, each to its own images.", "lower"),
    "class_tv": Meaning(
        "Class imbalance",
        "Total variation distance between the class frequencies here and in the training images, from 0 to 1.",
        "lower",
    ),
    "confidence": Meaning("Confidence", "Mean probability of the most likely class of an image.", "higher"),
    "memorised": Meaning("Copies", "Share of these images that copy a training image, by pixel distance.", "lower"),
    "nn_distance": Meaning(
        "Distance to the nearest training image",
        "Median Euclidean distance over all pixel values (0 to 255). Copies make it much smaller than for real images.",
        "",
    ),
}
FIRST = ("score", "fid", "class_agreement", "precision", "recall", "memorised")
# Longest first, because `score_std` also ends like `std` would.
_KNOWN = sorted((*MEANINGS, *(f"{metric}_std" for metric in MEANINGS)), key=len, reverse=True)


class Reading(NamedTuple):
    """A metric, read from its name: `eval/classifier_fid_n512` is the fid of 512 images by the classifier."""

    name: str
    extractor: str
    num_images: int
    value: float


def read_figures(metrics: Mapping[str, float]) -> dict[str, Reading]:
    """The metrics named `eval/[real_]<extractor>_<metric>_n<count>`, by `<metric>`; others are left out."""
    readings = {}
    for name, value in metrics.items():
        stem, _, count = name.removeprefix(REAL).removeprefix(GENERATED).rpartition("_n")
        metric = next((known for known in _KNOWN if stem.endswith(f"_{known}")), None)
        if metric is not None and count.isdigit():
            readings[metric] = Reading(name, stem.removesuffix(f"_{metric}"), int(count), float(value))
    return readings


def score_rows(
    metrics: Mapping[str, float], real_metrics: Mapping[str, float]
) -> tuple[list[ScoreRow], list[ScoreRow]]:
    """A row for each metric that has a meaning: those to see first, and the others."""
    generated, real = read_figures(metrics), read_figures(real_metrics)
    rows = {metric: _row(metric, generated, real) for metric in MEANINGS if metric in generated}
    return (
        [row for metric, row in rows.items() if metric in FIRST],
        [row for metric, row in rows.items() if metric not in FIRST],
    )


def _row(metric: str, generated: Mapping[str, Reading], real: Mapping[str, Reading]) -> ScoreRow:
    meaning, value = MEANINGS[metric], generated[metric].value
    of_real = real[metric].value if metric in real else None
    share, real_share = None, None
    if of_real is not None and min(value, of_real) >= 0 and value + of_real > 0:
        scale = 1.1 * max(value, of_real)
        share, real_share = round(100 * value / scale, 1), round(100 * of_real / scale, 1)
    return ScoreRow(
        label=meaning.label,
        name=generated[metric].name,
        meaning=meaning.text,
        better=meaning.better,
        value=_with_deviation(metric, generated),
        real=_with_deviation(metric, real) if of_real is not None else "",
        share=share,
        real_share=real_share,
    )


def _with_deviation(metric: str, readings: Mapping[str, Reading]) -> str:
    deviation = readings.get(f"{metric}_std")
    return f"{readings[metric].value:.3g}" + ("" if deviation is None else f" ±\u00a0{deviation.value:.2g}")


def lead(
    *,
    manifest: Manifest,
    num_levels: int | None,
    images_seen: int,
    nfe: int,
    generated: Mapping[str, Reading],
    real: Mapping[str, Reading],
    decision: Mapping[str, Any] | None,
) -> list[str]:
    """Paragraphs for a stranger: the data, the model, its quality, and the gate's decision if there is one.

    `num_levels` are those of training, None if it had any sigma. `decision` is the result of the register step.
    """
    noise = "any strength" if num_levels is None else f"{num_levels} strengths"
    size, color = manifest.image_size, "gray" if manifest.channels == 1 else "color"
    paragraphs = [
        f"The model was trained on {manifest.count('train'):,} {color} images of {size} x {size} pixels: "
        f"{manifest.source.rstrip('.')}.",
        f"It is a noise conditional score network (Song & Ermon 2019). It saw {images_seen:,} training images, "
        f"counting repetitions, with Gaussian noise of {noise}, and learned the score: the direction in which "
        f"the pixels become more likely. To generate an image, it starts from noise and follows the score for {nfe:,} "
        "network evaluations.",
    ]
    if "score" in generated and "score" in real:
        score, of_real = generated["score"], real["score"]
        scale = f" on a scale from 1 to {len(manifest.class_names)}" if score.extractor == "classifier" else ""
        quality = (
            f"{extractor_phrase(score.extractor)} gives the generated images a score of {score.value:.3g}{scale} for "
            f"being clear and varied. Real images that the model has not seen get {of_real.value:.3g}."
        )
    elif "fid" in generated and "fid" in real:
        quality = (
            f"{extractor_phrase(generated['fid'].extractor)} sees the generated images at a Fréchet distance of "
            f"{generated['fid'].value:.3g} from the training images, and real images that the model has not seen at "
            f"{real['fid'].value:.3g}. Lower is better."
        )
    else:
        quality = ""
    copies = copies_sentence(generated["memorised"]) if "memorised" in generated else ""
    if quality or copies:
        paragraphs.append(f"{quality} {copies}".strip())
    if decision is not None:
        version = f"version {decision['version']} of {decision['model']}"
        verb = "is the new champion" if decision["promoted"] else "is not the new champion"
        paragraphs.append(f"The model is registered as {version} and {verb}. Reason: {decision['reason']}.")
    return paragraphs


def copies_sentence(memorized: Reading) -> str:
    """How many of the generated images copy a training image."""
    copies = round(memorized.value * memorized.num_images)
    found = {0: "none is a copy", 1: "one is a copy"}.get(copies, f"{copies:,} are copies")
    return f"Of {memorized.num_images:,} generated images compared with every training image, {found}."


def extractor_phrase(extractor: str) -> str:
    """The extractor, as the subject of a sentence."""
    return {
        "classifier": "A classifier trained on the same labeled images",
        "clusters": "A network trained to tell clusters of similar training images apart",
        "inception": "The 2015 Inception network, which published scores use,",
        "dinov2": "DINOv2 ViT-L/14, which published FD-DINOv2 values use,",
        "dinov2-unpinned": "DINOv2 ViT-L/14 with other weights than the published ones",
    }.get(extractor, f"The extractor “{extractor}”")


def tiles(nfe: int, generated: Mapping[str, Reading], real: Mapping[str, Reading]) -> list[Tile]:
    """The numbers at the top of the page."""
    found = []
    if "score" in generated and "score" in real:
        value, of_real = generated["score"].value, real["score"].value
        note = f"of the score of real images: {value:.3g} vs. {of_real:.3g}"
        found.append(Tile("score", f"{value / of_real:.0%}", note))
    if "fid" in generated:
        note = f"real images: {real['fid'].value:.3g}; lower is better" if "fid" in real else "lower is better"
        found.append(Tile("Fréchet distance", f"{generated['fid'].value:.3g}", note))
    if "memorised" in generated:
        copies = generated["memorised"]
        number = round(copies.value * copies.num_images)
        found.append(Tile("copies", f"{number}", f"in {copies.num_images:,} generated images"))
    found.append(Tile("network evaluations", f"{nfe:,}", "per image (NFE)"))
    return found


MINUTE, HOUR, DAY = 60, 3600, 86400


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min`, `2.1 h` or `4.0 days`."""
    if seconds < 2 * MINUTE:
        return f"{seconds:,.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:,.1f} min"
    return f"{seconds / HOUR:,.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:,.1f} days"


def cost_line(ledger: Mapping[str, Any]) -> str:
    """The cost of the whole run, from `ncsn.runs.costs.account`; empty if no step has recorded its time."""
    actual = ledger["actual"]
    return _cost(actual["total"], ledger["prices"]["currency"]) if actual["steps"] else ""


def cost_facts(ledger: Mapping[str, Any], *, num_images: int) -> Iterator[Fact]:
    """The cost of the run, its plan, and the cost of 1,000 more images; `num_images` are those of the sample step."""
    currency, steps = ledger["prices"]["currency"], ledger["actual"]["steps"]
    if not steps:
        return
    # The times of the steps above are those of their last attempt, without its startup.
    yield Fact("Actual cost, including startup and earlier attempts", _cost(ledger["actual"]["total"], currency))
    if ledger["plan"] is not None:
        yield Fact("Planned cost", _cost(ledger["plan"]["total"], currency))
    if "sample" in steps and num_images:
        share = 1000 / num_images
        per_thousand = {name: share * value for name, value in steps["sample"].items()}
        yield Fact("Per 1,000 images", _cost(per_thousand, currency))


def _cost(cost: Mapping[str, float], currency: str) -> str:
    gpu = f" · {cost['gpu_hours']:,.2g} GPU hours" if cost["gpu_hours"] else ""
    return (
        f"{duration(cost['seconds'])} · {cost['cpu_hours']:,.2g} CPU hours{gpu} · {cost['money']:,.2g} {currency} · "
        f"{cost['kwh']:,.2g} kWh"
    )


DIGEST_SHOWN = 12


def result_line(step: str, result: Mapping[str, Any]) -> str:
    """The stored result of a step in one line."""
    match step:
        case "ingest":
            counts = " + ".join(f"{count:,} {split}" for split, count in result["counts"].items())
            return f"{counts} images, digest {result['digest'][:DIGEST_SHOWN]}"
        case "tune":
            before = "" if result["baseline"] is None else f" (original settings: {result['baseline']:.4g})"
            return f"{result['objective_name']} = {result['objective']:.4g}{before}, {len(result['trials'])} trials"
        case "train":
            loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
            return f"{result['images_seen']:,} images{loss}, {result['images_per_second']:,.0f} images/s"
        case "sample":
            return f"{result['num_images']:,} images, {result['nfe']:,} network evaluations per image"
        case "evaluate":
            return f"{result['gate']['name']} = {result['gate']['value']:.4g}"
        case "register":
            aliases = ", ".join(result["aliases"]) or "no alias"
            return f"{result['model']} version {result['version']} ({aliases})"
        case "report":
            return f"{result['size'] / 1000:,.0f} kB, {len(result['sections'])} sections"
    return _line_of_command(step, result)


def _line_of_command(step: str, result: Mapping[str, Any]) -> str:
    match step:
        case "likelihood":
            return f"{result['bits_per_dim']:.4f} +- {result['error']:.4f} bits/dim, {result['num_images']:,} images"
        case "neon":
            return f"w = {result['multiple']:g}, Frechet distance {min(result['distances'].values()):.4g}"
        case "select":
            best = f"{result['figure']} = {result['value']:.4g} at {result['images_seen']:,} images"
            return f"{best}, the best of {len(result['candidates'])}"
        case "ema":
            return f"{len(result['checkpoints'])} averages"
        case "figures":
            return f"{len(result['figures'])} figures: {', '.join(result['figures'])}"
    raise AssertionError(step)


TAGS = {  # the others are versions of packages, or for MLflow alone
    "mlflow.source.git.commit": "Git commit",
    "mlflow.docker.image.uri": "Image",
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
    facts = []
    for tag, label in TAGS.items():
        if values := _values(runs, tag):
            links = _values(runs, LINKS.get(tag, ""))
            # A tag may hold anything; only an address of a page becomes a link.
            link = links[0] if links and links[0].startswith(("http://", "https://")) else ""
            facts.append(Fact(label, ", ".join(values), link))
    versions = {tag.removesuffix(VERSION): None for tags in runs for tag in tags if tag.endswith(VERSION)}
    if versions:
        shown = (f"{name} {', '.join(_values(runs, name + VERSION))}" for name in versions)
        facts.append(Fact("Versions", " · ".join(shown)))
    return facts


def _values(runs: Sequence[Mapping[str, str]], tag: str) -> list[str]:
    return list(dict.fromkeys(tags[tag] for tags in runs if tags.get(tag)))
