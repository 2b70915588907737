"""The benchmark table: what a user waits for on this machine, and its target.

    python -m benchmarks [PART ...] [--out benchmarks.json]
    python -m benchmarks --gpu [--out gpu.json]

Parts: training, evaluation, data, ingest, folder, commands, sampling, ray, checkpoint, growth, serving, unet.
`folder`, which writes 4 GB, and `unet`, which needs diffusers, run only if they are named. `--gpu` needs a GPU and only
torch, numpy and the repository. The JSON file is written after each part, so an early end keeps the rows so far. If a
part fails, the others still run.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, table

PARTS = {
    "training": "benchmarks.training_step",
    "evaluation": "benchmarks.evaluation",
    "data": "benchmarks.data",
    "ingest": "benchmarks.ingest",
    "folder": "benchmarks.folder",
    "commands": "benchmarks.commands",
    "sampling": "benchmarks.sampling",
    "ray": "benchmarks.ray_workers",
    "checkpoint": "benchmarks.checkpoint_pause",
    "growth": "benchmarks.growth",
    "serving": "benchmarks.serving",
    "unet": "benchmarks.unet",
}
ON_REQUEST = ("folder", "unet")


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
    parser.add_argument("--gpu", action="store_true", help="the GPU's rows instead")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no GPU here")
    began = time.perf_counter()
    rows: list[Row] = []
    failures = 0
    for measure in _measures(options):
        try:
            found = measure()
        except Exception:  # noqa: BLE001 - the others take half an hour
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


def _measures(options: argparse.Namespace) -> list[Callable[[], list[Row]]]:
    all_but_on_request = [part for part in PARTS if part not in ON_REQUEST]
    if options.gpu:
        parts: list[Callable[[], list[Row]]] = importlib.import_module("benchmarks.gpu").parts()
        return parts
    return [partial(_rows_of, PARTS[part]) for part in options.parts or all_but_on_request]


def _rows_of(module: str) -> list[Row]:
    rows: list[Row] = importlib.import_module(module).rows()
    return rows


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
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
