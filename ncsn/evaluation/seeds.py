"""The Fréchet distance of several sets of samples, which differ in their seeds alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ncsn import storage
from ncsn.config import Config
from ncsn.evaluation.frechet import FrechetStatistics, frechet_distance, merged
from ncsn.evaluation.measure import Metric
from ncsn.evaluation.pieces import FeaturePiece, ImageSet, extract_piece, feature_pieces
from ncsn.evaluation.reference import Evaluator, extractor_of, load_reference, store_pieces
from ncsn.evaluation.runner import Runner


def set_distances(
    config: Config,
    dataset: str,
    evaluator: Evaluator,
    sets: Sequence[ImageSet],
    *,
    near: str,
    runner: Runner,
    on_images: Callable[[int], None],
) -> list[float]:
    """Fréchet distance of each set to the reference; the arguments are those of `measure_sets`."""
    distances = []
    for images in sets:
        pieces = feature_pieces(config, dataset, images, near=near, fingerprint=evaluator.extractor.fingerprint)
        store_pieces(pieces, runner=runner, on_images=on_images)
        distances.append(runner.one(_distance, pieces, evaluator.reference.fingerprint, gpu=False))
        storage.delete_folder(pieces[0].folder)
    return distances


def seed_metrics(distances: Sequence[float], count: int) -> dict[str, Metric]:
    """Mean, least and largest distance of sets of `count` images, by short name; nothing of a single one."""
    if len(distances) < 2:
        return {}
    mean = sum(distances) / len(distances)
    values = {"fid_mean": mean, "fid_min": min(distances), "fid_max": max(distances)}
    return {name: Metric(value, count) for name, value in values.items()}


def _distance(pieces: list[FeaturePiece], fingerprint: str) -> float:
    first = pieces[0]
    reference = load_reference(first.dataset, fingerprint)
    assert reference is not None, "the evaluator has it"
    extractor = partial(extractor_of, first.config, first.dataset)
    parts = [FrechetStatistics.of(extract_piece(piece, extractor).features) for piece in pieces]
    return frechet_distance(merged(parts), reference.statistics)
