"""What a report shows, as plain values: words, numbers and pictures, no numbers left to compute.

Every part but the title may be missing; the page then has no such section.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Picture:
    """An image file inside the page.

    Attributes:
        content: A PNG, GIF or JPEG file.
        alt: What it shows, for those who do not see it.
        caption: A sentence below it; empty for none.
        width: Widest that it is shown, in CSS pixels.
        pixelated: Whether its pixels are to stay visible when it is enlarged.
    """

    content: bytes
    alt: str
    caption: str = ""
    width: int = 960
    pixelated: bool = True

    @property
    def uri(self) -> str:
        """The file as a `data:` URI."""
        kinds = {b"\x89PNG": "png", b"GIF8": "gif", b"\xff\xd8\xff\xe0": "jpeg"}
        return f"data:image/{kinds[self.content[:4]]};base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        svg: An `<svg>` element of our own making, put into the page as it is.
        alt: What it shows.
        caption: A sentence below it; empty for none.
    """

    svg: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Film:
    """Images on their way from noise, to be played.

    Attributes:
        frames: One picture with the frames below each other, all of one size.
        size: Width and height of a frame in pixels.
        labels: A word for each frame.
    """

    frames: Picture
    size: tuple[int, int]
    labels: Sequence[str]


@dataclass(frozen=True)
class Tile:
    """A number to see first: what it is, the number, what to compare it with."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class ScoreRow:
    """A figure of merit of the samples beside that of real images.

    Attributes:
        label: Its name in words.
        name: Its name in MLflow and in the code.
        meaning: What it says, one sentence.
        better: The direction of improvement; empty if there is none.
        value: Of the samples.
        real: Of real test images; empty if it has none.
        share: Length of the samples' bar in percent; None for no bar.
        real_share: Where the mark of the real images stands, in percent.
    """

    label: str
    name: str
    meaning: str
    better: Literal["higher", "lower", ""]
    value: str
    real: str
    share: float | None = None
    real_share: float | None = None


@dataclass(frozen=True)
class Scores:
    """The figures and what has to be known to compare them.

    Attributes:
        rows: The figures to see first.
        more: Other figures.
        measured: Who measured how many images, one sentence.
        fingerprint: Hash of extractor and reference images.
        notes: What a reader should know.
    """

    rows: Sequence[ScoreRow]
    more: Sequence[ScoreRow]
    measured: str
    fingerprint: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Neighbour:
    """A sample beside the training images that are nearest to it.

    Attributes:
        picture: The sample, then the nearest training image by pixels, then by features.
        distance: To the nearest by pixels, in words.
        memorised: Whether the sample copies a training image.
    """

    picture: Picture
    distance: str
    memorised: bool


@dataclass(frozen=True)
class Figures:
    """A section of plots and pictures.

    Attributes:
        heading: Its title.
        text: What is to be seen, a paragraph.
        plots: Shown first.
        pictures: Shown after them.
        hints: What to do about what is seen; each a sentence.
        table: Column names and rows below the pictures; empty for none.
    """

    heading: str
    text: str
    plots: Sequence[Plot] = ()
    pictures: Sequence[Picture] = ()
    hints: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Timing:
    """A step and how long it took.

    Attributes:
        step: Its name.
        seconds: In words.
        result: What came of it.
        share: Of the longest step, in percent.
    """

    step: str
    seconds: str
    result: str
    share: float


@dataclass(frozen=True)
class Fact:
    """A line of the lineage.

    Attributes:
        label: What it is.
        value: An id, an address or a version.
        link: Address of a page about it; empty for none.
    """

    label: str
    value: str
    link: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: Name of the experiment.
        run: Name of the run.
        finished_at: When its last step ended.
        verdict: The registry's decision in two words; empty if it was not asked.
        lead: Paragraphs for somebody who knows nothing of the project.
        tiles: The numbers to see first.
        samples: Generated images.
        scores: How good they are.
        film: How they come about.
        neighbours: Whether they are copies.
        neighbours_text: What that means.
        panels: More figures: inpainting, quality against cost, training, search.
        timings: The steps.
        total: Time of all steps, in words.
        costs: What it cost, and was estimated to.
        lineage: Where everything is and comes from.
        config: The experiment as YAML.
    """

    title: str
    run: str
    finished_at: str = ""
    verdict: str = ""
    lead: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    samples: Picture | None = None
    scores: Scores | None = None
    film: Film | None = None
    neighbours: Sequence[Neighbour] = ()
    neighbours_text: str = ""
    panels: Sequence[Figures] = ()
    timings: Sequence[Timing] = ()
    total: str = ""
    costs: Sequence[Fact] = ()
    lineage: Sequence[Fact] = ()
    config: str = ""

    @property
    def headings(self) -> list[str]:
        """What the page has sections about, in their order."""
        parts = {
            "samples": self.samples,
            "film": self.film,
            "scores": self.scores,
            "neighbours": self.neighbours,
            **{panel.heading.lower(): panel for panel in self.panels},
            "timings": self.timings,
            "lineage": self.lineage,
            "config": self.config,
        }
        return [name for name, part in parts.items() if part]


TAGS = {
    "mlflow.source.git.commit": "Git commit",
    "mlflow.docker.image.uri": "Image",
    "kfp.pipeline_run_id": "KFP run",
    "ray.submission_id": "Ray submission",
    "ray.job_id": "Ray job",
    "ray.session": "Ray session",
    "mlflow.user": "Started by",
}
"""Tag -> its name in the report; the others are versions of packages, or of use to MLflow alone."""
LINKS = {"kfp.pipeline_run_id": "kfp.pipeline_run_url", "ray.submission_id": "ray.dashboard_url"}
VERSION = ".version"


def tag_facts(runs: Sequence[Mapping[str, str]]) -> list[Fact]:
    """Facts from the tags of MLflow runs; where several steps had different values, all of them in order.

    Args:
        runs: The tags of the whole run, then of each step.
    """
    facts = []
    for tag, label in TAGS.items():
        values = _values(runs, tag)
        links = _values(runs, LINKS.get(tag, ""))
        if values:
            facts.append(Fact(label, ", ".join(values), link=_safe(links[0]) if links else ""))
    versions = {tag.removesuffix(VERSION): None for tags in runs for tag in tags if tag.endswith(VERSION)}
    if versions:
        shown = (f"{name} {', '.join(_values(runs, name + VERSION))}" for name in versions)
        facts.append(Fact("Versions", " · ".join(shown)))
    return facts


def _values(runs: Sequence[Mapping[str, str]], tag: str) -> list[str]:
    return list(dict.fromkeys(tags[tag] for tags in runs if tags.get(tag)))


def _safe(address: str) -> str:
    """An address only if a browser would fetch it as a page: a tag may hold anything."""
    return address if address.startswith(("http://", "https://")) else ""


def search_panel(result: Mapping[str, Any], pictures: Sequence[bytes]) -> Figures:
    """The section about the search that a run's settings come from.

    Args:
        result: Result of the tune step, as plain values.
        pictures: Its plots, PNG files.
    """
    best, baseline = result["objective"], result["baseline"]
    before = "" if baseline is None else f", where the settings as they stood reached {baseline:.4g}"
    finished = sum(trial["status"] == "finished" for trial in result["trials"])
    return Figures(
        heading="Search",
        text=f"{len(result['trials'])} trials were started and {finished} went to the end. The best reached "
        f"{result['objective_name']} = {best:.4g} after {result['images_seen']:,} images{before}; lower is better.",
        pictures=[Picture(picture, alt="the trials of the search", width=820, pixelated=False) for picture in pictures],
        table=[("setting", "best"), *((path, f"{value}") for path, value in result["values"].items())],
    )
