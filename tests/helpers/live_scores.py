"""Running scores in the process of a Ray driver."""

from __future__ import annotations

import numpy as np

from ncsn.config import Config
from ncsn.distributed.sampling import make_shards, plan_shards
from ncsn.distributed.tasks import runner_of
from ncsn.evaluation.frechet import RunningDistance, RunningScore
from ncsn.evaluation.reference import open_evaluator
from ncsn.progress import Progress


def live_scores(config: Config, dataset: str, *, checkpoint: str, folder: str) -> tuple[list[RunningScore], list[int]]:
    """The running scores of the images of a config, and how many images were there when each was due."""
    count = config.sampling.num_images
    running = RunningDistance(
        open_evaluator(config, dataset, runner=runner_of(config.compute)).reference.statistics, count=count
    )
    scores: list[RunningScore] = []
    there: list[int] = []

    def take(first: int, features: np.ndarray) -> None:
        due = running.add(first, features)
        scores.extend(due)
        there.extend(progress.done for _ in due)

    progress = Progress()
    shards = plan_shards(config, checkpoint=checkpoint, folder=folder, dataset=dataset)
    make_shards(config, shards, progress=progress, on_features=take)
    return scores, there
