"""Metrics in words. Imports no torch, because the command line uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ncsn.config.evaluation import VERSUS
from ncsn.report.page import ScoreRow, Tile

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
        "Distance between the features of these images and those of {reference}. Fewer images give a larger value.",
        "lower",
    ),
    "fid_infinity": Meaning(
        "Fréchet distance without bias",
        "The same, extrapolated to infinitely many images. It compares models of different diversity.",
        "lower",
    ),
    "fid_mean": Meaning("Fréchet distance, mean", "Mean over sets of images with other seeds.", "lower"),
    "fid_min": Meaning("Fréchet distance, least", "The least of them, which many papers report.", "lower"),
    "fid_max": Meaning("Fréchet distance, largest", "The largest of them.", "lower"),
    "kid": Meaning(
        "Kernel distance",
        "Distance to {reference} that does not depend on the number of images. It averages zero for real "
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
    "bits_per_dim": Meaning(
        "Bits per dimension",
        "How many bits the model needs for a color value of a test image, at most. It says nothing of how images look.",
        "lower",
    ),
    "class_agreement": Meaning("Class agreement", "Share of the images classified as the requested class.", "higher"),
    "class_kid": Meaning("Kernel distance by class", "Its mean over the classes, each to its own images.", "lower"),
    "class_tv": Meaning(
        "Class imbalance",
        "Total variation distance between the class frequencies here and in {reference}, from 0 to 1.",
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
ERRORS = ("_std", "_se")  # after the name of a metric: its standard deviation over samples, or standard error
# Longest first, because `score_std` also ends like `std` would.
_KNOWN = sorted((f"{metric}{error}" for metric in MEANINGS for error in ("", *ERRORS)), key=len, reverse=True)


class Reading(NamedTuple):
    """A metric, read from its name: `eval/classifier_fid_n512` is the fid of 512 images by the classifier."""

    name: str
    extractor: str
    num_images: int
    value: float
    split: str = "train"  # of the images that it compares with


def read_metrics(metrics: Mapping[str, float]) -> dict[str, Reading]:
    """The metrics named `eval/[real_]<extractor>_<metric>_n<count>`, by `<metric>`; others are left out."""
    readings = {}
    for name, value in metrics.items():
        stem, _, count = name.removeprefix(REAL).removeprefix(GENERATED).rpartition("_n")
        metric = next((known for known in _KNOWN if f"_{stem}".endswith(f"_{known}")), None)
        if metric is not None and count.isdigit():
            extractor, _, split = stem.removesuffix(metric).removesuffix("_").partition(VERSUS)
            readings[metric] = Reading(name, extractor, int(count), float(value), split or "train")
    return readings


def score_rows(
    metrics: Mapping[str, float], real_metrics: Mapping[str, float]
) -> tuple[list[ScoreRow], list[ScoreRow]]:
    """A row for each metric that has a meaning: those to see first, and the others."""
    generated, real = read_metrics(metrics), read_metrics(real_metrics)
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
        meaning=meaning.text.format(reference=reference_images(generated[metric].split)),
        better=meaning.better,
        value=_with_deviation(metric, generated),
        real=_with_deviation(metric, real) if of_real is not None else "",
        share=share,
        real_share=real_share,
    )


def reference_images(split: str) -> str:
    """What samples are compared with, in words."""
    return "the training images" if split == "train" else f"the {split} images"


def real_images(split: str) -> str:
    """The real images that are measured beside them, in words."""
    return "real images that the model has not seen" if split == "train" else "real training images"


def _with_deviation(metric: str, readings: Mapping[str, Reading]) -> str:
    deviation = next((readings[f"{metric}{error}"] for error in ERRORS if f"{metric}{error}" in readings), None)
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
            f"being clear and varied. R{real_images(score.split)[1:]} get {of_real.value:.3g}."
        )
    elif "fid" in generated and "fid" in real:
        quality = (
            f"{extractor_phrase(generated['fid'].extractor)} sees the generated images at a Fréchet distance of "
            f"{generated['fid'].value:.3g} from {reference_images(generated['fid'].split)}, and "
            f"{real_images(generated['fid'].split)} at {real['fid'].value:.3g}. Lower is better."
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
