"""The plot of docs/results.md, from the files of `python -m benchmarks --out`.

python -m benchmarks.plots benchmarks.json [MORE.json ...] --folder docs/images
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Found = dict[str, Any]
COLOR = "#2a7f62"
GROWTH = {
    "training images/s at 28x28 on one thread, batch": ("batch", "training images/s"),
    "training images/s at batch 32 on one thread, size": ("image side in pixels", "training images/s"),
    "training images/s of ncsn with 16 channels, workers": ("one-thread workers on two cores", "training images/s"),
    "sampled images/s at 9 evaluations on one thread, images at once": ("images at once", "sampled images/s"),
}


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
    figure.tight_layout()
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)


def _curve(axes: Axes, points: list[tuple[int, float]]) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], marker="o", color=COLOR)
    if max(points)[0] > 4:
        axes.set_xscale("log", base=2)
    if max(y for _, y in points) > 20 * min(y for _, y in points):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08 * max(y for _, y in points))
    axes.set_xticks([x for x, _ in points], [str(x) for x, _ in points], fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _number(row: Found, start: str) -> int:
    found = re.match(r"\d+", row["measure"].removeprefix(start).strip())
    assert found
    return int(found.group())


def main() -> None:
    """Draw it; a row of a later file replaces that of the same name in an earlier one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    rows = {row["part"] + row["measure"]: row for file in options.files for row in json.loads(file.read_text())["rows"]}
    growth(list(rows.values()), options.folder / "performance_growth.png")


if __name__ == "__main__":
    main()
