"""Sets of images measured: what is seen in them piece by piece, then their figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ncsn import storage
from ncsn.config import Config
from ncsn.data.training_images import open_cache
from ncsn.evaluation.feature_pieces import FeaturePiece, feature_pieces, look, missing_pieces
from ncsn.evaluation.figures import NEIGHBOUR_IMAGES, Measured, measure
from ncsn.evaluation.image_sets import SampleSet, SplitSet
from ncsn.evaluation.judge import REFERENCE_SPLIT, SEED, Judge, extractor_of, look_at
from ncsn.evaluation.reference import load_reference
from ncsn.evaluation.runner import Runner
from ncsn.evaluation.running import RunningScore


@dataclass(frozen=True)
class _Work:
    """One set to measure: its place among the sets, its pieces in order, and the fingerprint of the reference."""

    number: int
    pieces: list[FeaturePiece]
    fingerprint: str


def measure_sets(
    config: Config,
    dataset: str,
    judge: Judge,
    sets: Sequence[SampleSet | SplitSet],
    *,
    near: str,
    runner: Runner,
    on_images: Callable[[int], None],
    on_score: Callable[[RunningScore], None] | None = None,
) -> list[Measured]:
    """All figures of each set.

    The features are kept below `near` until all sets are measured, so that a second call goes on where the first was
    cut off.

    Args:
        config: The experiment.
        dataset: URI of the ingested data set.
        judge: Its extractor and reference.
        sets: What to measure.
        near: URI of the folder for the pieces.
        runner: Computes, the features on GPUs if the config uses them.
        on_images: Called with n whenever n more images were looked at.
        on_score: Called with the Frechet distances of the first set so far: at once where this process computes, else
            with all of them at the end.

    Raises:
        ValueError: for images that do not fit the extractor, fewer images than splits, or features that are not finite.
    """
    works = [
        _Work(
            number,
            feature_pieces(config, dataset, images, near=near, fingerprint=judge.extractor.fingerprint),
            judge.reference.fingerprint,
        )
        for number, images in enumerate(sets)
    ]
    if runner.apart:
        pieces = [piece for work in works for piece in work.pieces]
        missing = [piece for work in works for piece in missing_pieces(work.pieces)]
        on_images(sum(map(len, pieces)) - sum(map(len, missing)))
        for piece, _ in runner.each(look_at, missing, gpu=True):
            on_images(len(piece))
        found = {work.number: measured for work, measured in runner.each(_measure, works, gpu=False)}
        if on_score is not None:
            for score in found[0].running:
                on_score(score)
    else:
        found = {
            work.number: _measure(work, on_images=on_images, on_score=None if work.number else on_score)
            for work in works
        }
    for work in works:
        storage.delete_folder(work.pieces[0].folder)
    return [found[work.number] for work in works]


def _measure(
    work: _Work,
    *,
    on_images: Callable[[int], None] | None = None,
    on_score: Callable[[RunningScore], None] | None = None,
) -> Measured:
    first = work.pieces[0]
    config, dataset, images = first.config, first.dataset, first.images
    reference = load_reference(dataset, work.fingerprint)
    assert reference is not None, "the judge has it"
    return measure(
        (look(piece, partial(extractor_of, config, dataset), on_images=on_images) for piece in work.pieces),
        count=images.count,
        first_images=images.head(NEIGHBOUR_IMAGES),
        reference=reference,
        training_images=open_cache(dataset, REFERENCE_SPLIT).images,
        num_splits=config.evaluation.num_splits,
        seed=SEED,
        on_score=on_score,
    )
