"""The plots of docs/results.md, from the files of `python -m benchmarks --out`.

python -m benchmarks.plots benchmarks.json [MORE.json ...] --folder docs/images
"""

from __future__ import annotations

import argparse
import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Found = dict[str, Any]
REACHED, MISSED = "#2a7f62", "#c0504d"
GROWTH = {
    "training images/s at 28x28 on one thread, batch": ("batch", "images/s"),
    "training images/s at batch 32 on one thread, size": ("image side in pixels", "images/s"),
    "training images/s of ncsn with 16 channels, workers": ("one-thread workers on two cores", "images/s"),
    "sampled images/s at 9 evaluations on one thread, images at once": ("images at once", "sampled images/s"),
}


def against_targets(rows: list[Found], path: Path) -> None:
    """Each value over its target on a logarithmic axis; to the right of 1 is good."""
    with_target = [row for row in rows if row["target"] is not None]
    ratios = [
        row["value"] / row["target"] if row["higher_is_better"] else row["target"] / row["value"] for row in with_target
    ]
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(with_target) + 1))
    places = range(len(with_target) - 1, -1, -1)
    axes.barh(
        list(places),
        [math.log2(ratio) for ratio in ratios],
        color=[REACHED if row["reached"] else MISSED for row in with_target],
    )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(list(places), [_label(row) for row in with_target], fontsize=8)
    ends = range(math.floor(min(map(math.log2, ratios))), math.ceil(max(map(math.log2, ratios))) + 1)
    axes.set_xticks(list(ends), [f"{2.0**end:g}x" for end in ends])
    axes.set_xlabel("value over target; right of 1x is better")
    _finish(figure, path)


def growth(rows: list[Found], path: Path) -> None:
    """Images per second against batch, image size, workers and samples."""
    found = {
        start: [(_number(row, start), row["value"]) for row in rows if row["measure"].startswith(f"{start} ")]
        for start in GROWTH
    }
    curves = {start: points for start, points in found.items() if points}
    if not curves:
        return
    figure, panels = plt.subplots(1, len(curves), figsize=(3 * len(curves), 2.8), squeeze=False)
    for axes, (start, points) in zip(panels[0], curves.items(), strict=True):
        label, unit = GROWTH[start]
        _curve(axes, points)
        axes.set_xlabel(label, fontsize=9)
        axes.set_title(unit, fontsize=9)
    _finish(figure, path)


def _curve(axes: Axes, points: list[tuple[int, float]]) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], marker="o", color=REACHED)
    if max(points)[0] > 4:
        axes.set_xscale("log", base=2)
    if max(y for _, y in points) > 20 * min(y for _, y in points):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks([x for x, _ in points], [str(x) for x, _ in points], fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _number(row: Found, start: str) -> int:
    found = re.match(r"\d+", row["measure"].removeprefix(start).strip())
    assert found
    return int(found.group())


def _label(row: Found) -> str:
    return textwrap.fill(f"{row['part']}: {row['measure']}".replace("`", ""), 60)


def _finish(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Draw both; a row of a later file replaces that of the same name in an earlier one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    rows = {row["part"] + row["measure"]: row for file in options.files for row in json.loads(file.read_text())["rows"]}
    against_targets(list(rows.values()), options.folder / "performance_targets.png")
    growth(list(rows.values()), options.folder / "performance_growth.png")


if __name__ == "__main__":
    main()
