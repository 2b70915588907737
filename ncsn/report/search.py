"""What a search over settings found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ncsn.report.page import Figures, Picture


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
