"""The benchmark table: what a user waits for on this machine, and its target.

    python -m benchmarks [PART ...] [--out benchmarks.json]

Parts: ingest, commands, ray, checkpoint, serving, unet. `unet`, which needs diffusers, runs only if it is named. The
JSON file is written after each part, so an early end keeps the rows so far. If a part fails, the others still run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.measure import Row, table

PARTS = {
    "ingest": "benchmarks.ingest",
    "commands": "benchmarks.commands",
    "ray": "benchmarks.ray_workers",
    "checkpoint": "benchmarks.checkpoint_pause",
    "serving": "benchmarks.serving",
    "unet": "benchmarks.unet",
}
ON_REQUEST = ("unet",)


def main() -> None:
    """Measure the chosen parts, print the table and write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"of {', '.join(PARTS)}; all but {', '.join(ON_REQUEST)} if none is named",
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    began = time.perf_counter()
    rows: list[Row] = []
    failures = 0
    for part in options.parts or [part for part in PARTS if part not in ON_REQUEST]:
        try:
            found: list[Row] = importlib.import_module(PARTS[part]).rows()
        except Exception:  # noqa: BLE001 - the others take minutes
            traceback.print_exc()
            failures += 1
            continue
        for row in found:
            rows.append(row)
            print(
                f"{time.perf_counter() - began:5.0f} s  {row.part}: {row.measure}: {row.value:.3g} {row.unit}",
                flush=True,
            )
        if options.out:
            seconds = round(time.perf_counter() - began)
            whole = {"machine": _machine(), "seconds": seconds, "rows": [row.to_json() for row in rows]}
            options.out.write_text(json.dumps(whole, indent=1) + "\n")
    print(table(rows))
    if failures:
        sys.exit(f"{failures} part(s) failed, see above; the table has the others")


def _machine() -> dict[str, str | int | None]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
