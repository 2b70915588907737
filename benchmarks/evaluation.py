"""Evaluation against torch-fidelity with the same Inception graph, and the Fréchet distance against scipy's root."""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import get_featuresdict_from_dataset

from benchmarks.measure import Row, in_turns, own_process, ratio
from ncsn.environment import settle
from ncsn.evaluation.extractors import batches, joined
from ncsn.evaluation.extractors.published import PUBLISHED_SHA256, InceptionExtractor
from ncsn.evaluation.frechet import FrechetStatistics, frechet_distance

DIMENSIONS, BATCH = 2048, 64


class RandomGraph(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """The graph with initial weights, which cost the same as the official ones and need no download."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Load nothing."""


def statistics_row(*, rounds: int, dimensions: int = DIMENSIONS) -> Row:
    """Our distance of two sets of statistics against the usual code, scipy's sqrtm of the product."""
    draw = np.random.default_rng(0)
    mixing = draw.standard_normal((dimensions, dimensions)) / dimensions**0.5
    a, b = (
        FrechetStatistics.of(draw.standard_normal((5 * dimensions, dimensions)) @ mixing + shift) for shift in (0, 0.1)
    )
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = frechet_distance(a, b)

    def usual() -> None:
        root, shift = scipy.linalg.sqrtm(a.covariance @ b.covariance).real, a.mean - b.mean
        found["usual"] = float(shift @ shift + np.trace(a.covariance + b.covariance - 2 * root))

    seconds = in_turns({"ours": ours, "usual": usual}, rounds=rounds)
    return Row(
        "evaluation",
        f"Fréchet distance at {dimensions} dimensions over scipy's sqrtm",
        ratio(seconds, "usual", "ours"),
        target=5,
        detail=f"{statistics.median(seconds['ours']):.1f} and {statistics.median(seconds['usual']):.1f} s; "
        f"distances {found['ours']:.6f} and {found['usual']:.6f}",
    )


def features_row(*, images: int, rounds: int) -> Row:
    """Features of images against torch-fidelity's own loop over the same graph, on all cores."""
    with (
        tempfile.TemporaryDirectory() as folder,
        own_process(prepare_ours, weights := str(_random_weights(Path(folder))), images) as ours,
        own_process(prepare_theirs, weights, images) as theirs,
    ):
        seconds = in_turns({"ours": ours, "torch-fidelity": theirs}, rounds=rounds)
    mine, other = statistics.median(seconds["ours"]), statistics.median(seconds["torch-fidelity"])
    return Row(
        "evaluation",
        f"Inception features of {images:,} images over torch-fidelity's, same graph",
        ratio(seconds, "torch-fidelity", "ours"),
        target=1,
        detail=f"{images / mine:.1f} and {images / other:.1f} images/s",
    )


def prepare_ours(weights: str, images: int) -> Callable[[], object]:
    """As the evaluate step does it."""
    settle()
    PUBLISHED_SHA256["inception"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest()  # they are random
    extractor = InceptionExtractor(weights)
    pixels = _pixels(images)
    return lambda: joined([extractor.extract(batch) for batch in batches(pixels, batch_size=BATCH)])


def prepare_theirs(weights: str, images: int) -> Callable[[], object]:
    """As torch-fidelity does it."""
    graph = FeatureExtractorInceptionV3("port", ["2048"], feature_extractor_weights_path=weights).eval()
    data = Unlabeled(torch.from_numpy(_pixels(images).transpose(0, 3, 1, 2).copy()))
    return lambda: get_featuresdict_from_dataset(data, graph, BATCH, False, False, False)


def _pixels(images: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)


class Unlabeled(TensorDataset):
    """Images alone, as torch-fidelity expects them."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index)[0]


def _random_weights(folder: Path) -> Path:
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    graph = RandomGraph("random", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    torch.save(graph.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def rows() -> list[Row]:
    """Both rows, at the sizes of the table."""
    return [statistics_row(rounds=2), features_row(images=512, rounds=2)]


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
