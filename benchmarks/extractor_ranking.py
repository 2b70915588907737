"""Whether an extractor without labels ranks models as the classifier with labels does.

    python -m benchmarks.extractor_ranking CHECKPOINTS DATASET [--out ranking.json]

CHECKPOINTS is the folder of a run's checkpoints (trained with a large train.keep_checkpoints), DATASET the URI of its
dataset, whose images have labels. The Fréchet distance of the images of every checkpoint is taken by each extractor;
Spearman's coefficient compares the two rankings. Then real test images are damaged more and more: the distance should
grow with each step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from ncsn.config import Config
from ncsn.core.samplers.settings import KarrasHeun
from ncsn.data.format import Rows, read_split
from ncsn.evaluation.extractors import batches, joined
from ncsn.evaluation.features import extractor_of
from ncsn.evaluation.reference import Evaluator, open_evaluator
from ncsn.model.checkpoint import CheckpointStore, TrainedNetwork, load_checkpoint
from ncsn.model.generate import generate

EXTRACTORS = ("classifier", "clusters")
BATCH = 100

Distance = Callable[[np.ndarray], float]


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.extractor_ranking",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints")
    parser.add_argument("dataset")
    parser.add_argument("--images", type=int, default=800, help="of each checkpoint and of each kind of damage")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    networks = [_network(options.checkpoints, name) for name in sorted(CheckpointStore(options.checkpoints).names())]
    generated = [_generated(network, options.images) for network in networks]
    damaged = damages(read_split(options.dataset, "test"), count=options.images)
    distances = {}
    for name in EXTRACTORS:
        distance = _distance(networks[0].config, options.dataset, name)
        series = {"checkpoints": generated} | damaged
        distances[name] = {kind: [distance(images) for images in sets] for kind, sets in series.items()}
    _print(distances)
    if options.out:
        options.out.write_text(json.dumps(distances, indent=1) + "\n")


def damages(test: Rows, *, count: int) -> dict[str, list[np.ndarray]]:
    """Kind of damage -> sets of `count` test images, each damaged more than the one before; the first is not."""
    rng = np.random.default_rng(0)
    images, size = test.images[:count], test.images.shape[1]

    def noisy(sigma: float) -> np.ndarray:
        return _uint8(images + sigma * rng.standard_normal(images.shape))

    def blurred(sigma: float) -> np.ndarray:
        return _uint8(gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0)))

    def cut(share: float) -> np.ndarray:
        result, side = images.copy(), round(size * share**0.5)
        for image, (top, left) in zip(result, rng.integers(0, size - side + 1, (len(images), 2)), strict=True):
            image[top : top + side, left : left + side] = 0
        return result

    def without(classes: int) -> np.ndarray:
        kept = rng.permutation(np.flatnonzero(test.labels >= classes))
        return test.images[np.resize(kept, count)]

    return {
        "noise": [noisy(sigma) for sigma in (0, 8, 16, 32, 64, 96)],
        "blur": [blurred(share * size) for share in (0, 0.04, 0.06, 0.08, 0.11, 0.14)],
        "cutouts": [cut(share) for share in (0, 0.06, 0.15, 0.25, 0.4, 0.6)],
        "dropped classes": [without(classes) for classes in (0, 1, 2, 4, 6, 8)],
    }


def _network(checkpoints: str, name: str) -> TrainedNetwork:
    return load_checkpoint(f"{checkpoints}/{name}")


def _generated(trained: TrainedNetwork, count: int) -> np.ndarray:
    sampler = KarrasHeun(num_steps=18)
    sampling = trained.config.sampling.model_copy(update={"sampler": sampler})
    return np.concatenate(
        [generate(trained, sampling=sampling, first=first, count=BATCH) for first in range(0, count, BATCH)]
    )


def _distance(config: Config, dataset: str, extractor: str) -> Distance:
    evaluation = config.evaluation.model_copy(update={"extractor": extractor})
    config = config.model_copy(update={"evaluation": evaluation})
    evaluator: Evaluator = open_evaluator(config, dataset)
    network = extractor_of(config, dataset)
    return lambda images: evaluator.distance(
        joined([network.extract(batch) for batch in batches(images, batch_size=500)]).features
    )


def _print(distances: dict[str, dict[str, list[float]]]) -> None:
    rankings = [distances[name]["checkpoints"] for name in EXTRACTORS]
    print(f"Spearman's coefficient over {len(rankings[0])} checkpoints: {spearmanr(*rankings).statistic:.3f}")
    for name, series in distances.items():
        for kind, values in series.items():
            grows = "" if kind == "checkpoints" else f"   grows: {values == sorted(values)}"
            print(f"{name:11} {kind:16} {' '.join(f'{value:9.4g}' for value in values)}{grows}")


def _uint8(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
