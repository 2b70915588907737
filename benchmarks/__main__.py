"""The benchmark table: what a user waits for, on this machine, beside what it should reach.

    python -m benchmarks [PART ...] [--out benchmarks.json]
    python -m benchmarks --gpu [--out gpu.json]

Parts: training, evaluation, data, ingest, ray, commands. `--gpu` needs a GPU and only torch, numpy and the
repository. The samplers' rows are benchmarks.samplers' own, which takes hours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, table

PARTS = {
    "training": "benchmarks.training_step",
    "evaluation": "benchmarks.evaluation",
    "data": "benchmarks.data",
    "ingest": "benchmarks.ingest",
    "ray": "benchmarks.ray_workers",
    "commands": "benchmarks.commands",
}


def main() -> None:
    """Measure the parts asked for, print the table and write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--gpu", action="store_true", help="the GPU's rows instead")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no GPU here")
    began = time.perf_counter()
    rows: list[Row] = []
    for measure in _measures(options):
        for row in measure():
            rows.append(row)
            print(
                f"{time.perf_counter() - began:5.0f} s  {row.part}: {row.measure}: {row.value:.3g} {row.unit}",
                flush=True,
            )
    print(table(rows))
    if options.out:
        found = {"machine": _machine(), "seconds": time.perf_counter() - began, "rows": [row.to_json() for row in rows]}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def _measures(options: argparse.Namespace) -> list[Callable[[], list[Row]]]:
    if options.gpu:
        return [importlib.import_module("benchmarks.gpu").rows]
    return [importlib.import_module(PARTS[part]).rows for part in options.parts or PARTS]


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
