"""The cost of tracking in a training: CPU seconds of the loop's calls, of the sending thread, and of the previews.

    python -m benchmarks.tracking configs/digits.yaml --images 70000

Trains on one core with a SQLite database, the most expensive case, because the database is in the same process. CPU
seconds do not depend on other load. The one-time import of MLflow is a separate number.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ncsn.config import Config, from_yaml
from ncsn.data.dataset import write_dataset
from ncsn.data.sources import open_source
from ncsn.model.checkpoint import CheckpointStore
from ncsn.tracking.live import LiveMetrics
from ncsn.tracking.mlflow_runs import step_run
from ncsn.training import loop
from ncsn.training.context import WorkerContext
from ncsn.training.loop import TrainingJob, train_loop

_IMPORT = "import time, torch; t = time.process_time(); import mlflow.tracking; print(time.process_time() - t)"


class TimedMetrics(LiveMetrics):
    """Measures the time that the training loop spends in it, and the CPU seconds of its thread."""

    def __init__(self, uri: str, run_id: str) -> None:
        super().__init__(uri, run_id)
        self.calls = self.sender = 0.0

    def log(self, metrics: Mapping[str, float], images_seen: int, when: int, *, png: bytes = b"") -> None:
        """Take the metrics or the picture of one moment."""
        self.calls += _thread_seconds(lambda: super(TimedMetrics, self).log(metrics, images_seen, when, png=png))

    def _run(self) -> None:
        self.sender = _thread_seconds(super()._run)


def measure(config: Config, root: Path) -> dict[str, float]:
    """CPU seconds of one training by one worker, and of the parts that tracking takes."""
    dataset = write_dataset(open_source(config.data), str(root / "data"), name="data", data=config.data).uri
    make, preview = vars(loop)["preview_png"], 0.0

    def timed(**named: Any) -> bytes | None:
        nonlocal preview
        started = time.thread_time()
        png = make(**named)
        preview += time.thread_time() - started
        return png

    vars(loop)["preview_png"] = timed
    with step_run(config, run="benchmark", step="train") as tracked:
        sink = TimedMetrics(tracked.uri, tracked.run_id)
        started = time.process_time()
        train_loop(
            TrainingJob(config=config, dataset=dataset, sink=sink),
            WorkerContext(),
            CheckpointStore(str(root / "checkpoints")),
        )
        whole = time.process_time() - started
    return {"training": whole, "calls": sink.calls, "sender": sink.sender, "preview": preview}


def main() -> None:
    """Measure and print a table; with --out also write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--images", type=int, default=70000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"storage.root={folder}", "compute.num_workers=1", f"train.num_images={options.images}"]
        config = from_yaml(options.config.read_text(), overrides=overrides)
        seconds = measure(config, Path(folder))
    once = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
    seconds["import once"] = float(once.stdout)
    for name, value in seconds.items():
        print(f"{name:<12} {value:9.3f} s  {100 * value / seconds['training']:6.2f} %")
    if options.out:
        options.out.write_text(json.dumps(seconds, indent=1))


def _thread_seconds(call: Callable[[], None]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


if __name__ == "__main__":
    main()
