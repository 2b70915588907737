"""What the page of the report shows: text and pictures, with nothing left to compute.

Every part but the title and the run may be missing. The page then has no such section.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Picture:
    """An image inside the page."""

    content: bytes  # a PNG file
    alt: str
    caption: str = ""
    width: int = 960  # at most, in CSS pixels
    pixelated: bool = True  # its pixels stay sharp when it is enlarged

    @property
    def uri(self) -> str:
        """The file as a `data:` URI."""
        return f"data:image/png;base64,{base64.b64encode(self.content).decode()}"


class Plot(NamedTuple):
    """An `<svg>` element of our own plots, which the page contains as it is."""

    svg: str
    alt: str


class Tile(NamedTuple):
    """One of the numbers at the top."""

    label: str
    value: str
    note: str


class ScoreRow(NamedTuple):
    """A metric of the samples next to that of real images."""

    label: str
    name: str  # in MLflow
    meaning: str
    better: Literal["higher", "lower", ""]
    value: str
    real: str  # empty if there is none
    share: float | None = None  # length of the bar of the samples, in percent
    real_share: float | None = None  # where the mark of the real images is, in percent


class Scores(NamedTuple):
    """The metrics, and what makes them comparable."""

    rows: Sequence[ScoreRow]
    more: Sequence[ScoreRow]  # shown on request
    measured: str
    fingerprint: str
    real: str  # the real images beside them, in words
    notes: Sequence[str] = ()


class Neighbor(NamedTuple):
    """A sample, then its nearest training images by pixels and by features."""

    picture: Picture
    distance: str
    memorized: bool


class Section(NamedTuple):
    """A section of plots and pictures."""

    heading: str
    text: str
    plots: Sequence[Plot] = ()
    pictures: Sequence[Picture] = ()
    hints: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()  # column names, then rows


class Timing(NamedTuple):
    """A step, and how long it took."""

    step: str
    seconds: str
    result: str
    share: float  # of the longest step, in percent


class Fact(NamedTuple):
    """A line of a list: a name, and an ID, an address or a version."""

    label: str
    value: str
    link: str = ""


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    run: str
    finished_at: str = ""
    verdict: str = ""  # of the gate, in two words
    lead: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    samples: Picture | None = None
    strip: Picture | None = None
    scores: Scores | None = None
    neighbors: Sequence[Neighbor] = ()
    neighbors_text: str = ""
    neighbors_hints: Sequence[str] = ()
    sections: Sequence[Section] = ()
    timings: Sequence[Timing] = ()
    total: str = ""
    costs: Sequence[Fact] = ()
    lineage: Sequence[Fact] = ()
    config: str = ""  # YAML

    @property
    def headings(self) -> list[str]:
        """The sections that the page has, in order."""
        parts = {
            "samples": self.samples,
            "strip": self.strip,
            "scores": self.scores,
            "neighbours": self.neighbors,
            **{section.heading.lower(): section for section in self.sections},
            "timings": self.timings,
            "lineage": self.lineage,
            "config": self.config,
        }
        return [name for name, part in parts.items() if part]
