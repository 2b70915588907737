"""Trains on a real Ray cluster of two nodes with a CPU each, one of which is drained, or lost and replaced, on the way.

    python node_cluster.py CONFIG DATASET RUN_FOLDER (drain | replace) AT_IMAGES

Writes `result.json` into the run's folder: what training returned, how many workers there were at each step, and the
checkpoints that were there for a resume alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from ncsn import distributed
from ncsn.config import from_yaml
from ncsn.progress import Progress
from ncsn.training.loop import TrainingJob, TrainOutcome

import ray  # isort: skip  # after ncsn.distributed, which sets its environment
import torch.distributed
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

NOTICE_SECONDS = 15
BATCH = 16
STEP_SECONDS = 0.6
ALONE_SECONDS = 5.0  # the same where the lost node is to come back: Ray Train looks for more nodes once a minute


class Slowly(Progress):
    """Progress that takes its time, and notes images seen and the number of workers."""

    def __init__(self, file: Path, *, alone: float) -> None:
        super().__init__()
        self.file, self.alone = file, alone

    def advance(self, n: int = 1) -> None:
        super().advance(n)
        if n != BATCH:  # what was there when training began
            return
        workers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        with self.file.open("a") as stream:
            stream.write(f"{self.done} {workers}\n")
        time.sleep(STEP_SECONDS if workers > 1 else self.alone)

    def seen(self) -> list[list[int]]:
        """[images seen, workers] of each step so far."""
        return [list(map(int, line.split())) for line in self.file.read_text().splitlines()]


def main(config: str, dataset: str, run: str, how: str, at_images: int) -> None:
    """Train, and take the second node away after some images; with `replace`, add a node when one worker trains."""
    folder = Path(run)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="WARNING")
    progress = Slowly(folder / "progress", alone=ALONE_SECONDS if how == "replace" else STEP_SECONDS)
    progress.file.touch()
    kept: list[str] = []

    def take_away(training: Future[TrainOutcome]) -> None:
        def wait(condition: Callable[[], object]) -> None:
            while not condition():
                assert not training.done(), training.result()
                time.sleep(0.1)

        wait(lambda: any(done >= at_images for done, _ in progress.seen()))
        if how == "replace":
            cluster.remove_node(nodes[1], allow_graceful=False)
            wait(lambda: any(workers == 1 for _, workers in progress.seen()))
            cluster.add_node(num_cpus=1)
        else:
            # What `ray drain-node` calls, without the seconds that the command takes to start.
            client = ray._raylet.GcsClient(address=cluster.address)
            reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            deadline = time.time_ns() // 1_000_000 + 1000 * NOTICE_SECONDS
            accepted, why_not = client.drain_node(nodes[1].node_id, reason, "simulated", deadline)
            assert accepted, why_not
            wait(lambda: kept.extend(path.name for path in folder.glob("checkpoints/resume-*")) or kept)

    history = str(folder / "history.json")
    job = TrainingJob(from_yaml(Path(config).read_text()), dataset, history=history, progress=progress)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(distributed.train, job, run_uri=run)
        take_away(training)  # here, since Ray adds nodes in the main thread alone
        outcome = training.result()
    (folder / "result.json").write_text(json.dumps({"outcome": asdict(outcome), "seen": progress.seen(), "kept": kept}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]))
