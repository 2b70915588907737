"""What a run did, in words for somebody who knows nothing of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ncsn.config import Config
from ncsn.data.format import Manifest
from ncsn.report.page import Tile
from ncsn.report.scores import Reading, read_figures


@dataclass(frozen=True)
class Facts:
    """What the steps of a run left, as plain values.

    Attributes:
        config: The experiment.
        manifest: Its data set.
        images_seen: Training images consumed.
        nfe: Score-network evaluations per generated image.
        metrics: Figures of the samples.
        real_metrics: The same of real test images.
        classes: Kinds that the extractor tells apart; 0 if it is not known.
        decision: The registry's: `model`, `version`, `promoted`, `aliases`, `reason`; None if it was not asked.
    """

    config: Config
    manifest: Manifest
    images_seen: int
    nfe: int
    metrics: Mapping[str, float]
    real_metrics: Mapping[str, float]
    classes: int
    decision: Mapping[str, Any] | None = None


def lead(facts: Facts) -> list[str]:
    """Paragraphs: what was trained on what, how it draws, how good that is, what became of it."""
    manifest, levels = facts.manifest, facts.config.levels
    colour = "gray" if manifest.channels == 1 else "in colour"
    paragraphs = [
        f"A program looked at {manifest.count('train'):,} pictures and learned to make new ones like them: "
        f"{manifest.image_size} by {manifest.image_size} pixels, {colour}. The pictures are "
        f"“{manifest.source.rstrip('.')}”.",
        f"It is a noise conditional score network (Song & Ermon 2019). It was shown {facts.images_seen:,} images, "
        f"buried in one of {levels.num_levels} strengths of noise, and learned in which direction each pixel has "
        "to move to come out of it. To draw an image it starts from nothing but noise and follows that direction, "
        f"{facts.nfe:,} times.",
    ]
    return paragraphs + [text for text in (_verdict(facts), _decision(facts.decision)) if text]


def _verdict(facts: Facts) -> str:
    generated, real = read_figures(facts.metrics), read_figures(facts.real_metrics)
    if "score" not in generated or "score" not in real:
        return ""
    score, best = generated["score"], real["score"]
    scale = f" on a scale from 1 to {facts.classes}" if facts.classes else ""
    text = (
        f"How good are they? {judge(score.extractor)} finds them clear and varied to a degree of {score.value:.3g}"
        f"{scale}; real images that the model has never seen reach {best.value:.3g}."
    )
    return f"{text} {_copies(generated['memorised'])}" if "memorised" in generated else text


def judge(extractor: str) -> str:
    """Who looks at the images, as the subject of a sentence."""
    return {
        "classifier": "A classifier trained on the same labelled pictures",
        "inception": "The Inception network of 2015, which published scores use,",
    }.get(extractor, f"The extractor “{extractor}”")


def _copies(memorised: Reading) -> str:
    copies = round(memorised.value * memorised.num_images)
    found = {0: "none copies", 1: "one copies"}.get(copies, f"{copies} copy")
    return f"Of {memorised.num_images:,} that were compared with every training image, {found} one."


def _decision(decision: Mapping[str, Any] | None) -> str:
    if decision is None:
        return ""
    verb = "became the champion" if decision["promoted"] else "did not become the champion"
    return f"It is version {decision['version']} of {decision['model']} and {verb}: {decision['reason']}."


def tiles(facts: Facts) -> list[Tile]:
    """The numbers to see first."""
    generated, real = read_figures(facts.metrics), read_figures(facts.real_metrics)
    found = []
    if "score" in generated and "score" in real:
        share = generated["score"].value / real["score"].value
        beside = f"{generated['score'].value:.3g} against {real['score'].value:.3g}"
        found.append(Tile("clear and varied", f"{share:.0%}", f"of real images' score: {beside}"))
    if "fid" in generated:
        beside = f"real test images: {real['fid'].value:.3g}" if "fid" in real else "Fréchet distance"
        found.append(Tile("distance to real images", f"{generated['fid'].value:.3g}", f"{beside}; less is better"))
    if "memorised" in generated:
        copies = generated["memorised"]
        found.append(
            Tile("copies", f"{round(copies.value * copies.num_images)}", f"among {copies.num_images:,} samples")
        )
    found.append(Tile("network evaluations", f"{facts.nfe:,}", "per image (NFE)"))
    return found
