"""Running scores: merged stretches of images equal all images at once, and memory does not grow with their number."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from ncsn.evaluation.extractors import Extracted
from ncsn.evaluation.frechet import (
    NORMAL_95,
    FrechetStatistics,
    RunningDistance,
    RunningScore,
    RunningScores,
    Spool,
    frechet_distance,
    frechet_uncertainty,
    merged,
    score_marks,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def reference(rng: np.random.Generator) -> FrechetStatistics:
    return FrechetStatistics.of(rng.standard_normal((5000, 4)))


def test_blocks_and_shards_in_any_order_give_the_score_of_all(rng, reference) -> None:
    features = rng.standard_normal((1003, 4)) + 0.3
    whole = RunningDistance(reference)
    for first, last in ((0, 1), (1, 8), (8, 500), (500, 1003)):
        whole.add(features[first:last])
    score = whole.score()
    assert score.num_images == 1003
    assert score.fid == pytest.approx(frechet_distance(FrechetStatistics.of(features), reference), rel=1e-10)
    margin = NORMAL_95 * frechet_uncertainty(features, reference)
    assert (score.fid - score.low, score.high - score.fid) == pytest.approx((margin, margin), rel=1e-8)
    shards = []
    for first, last in ((700, 1003), (0, 333), (333, 700)):
        shards.append(RunningDistance(reference, first=first))
        shards[-1].add(features[first:last])
    for shard in shards[1:]:
        shards[0].merge(shard)
    assert shards[0].score().fid == pytest.approx(score.fid, rel=1e-10)
    assert shards[0].score().high == pytest.approx(score.high, rel=1e-8)
    assert merged(shards[0].groups).count == 1003


def test_the_interval_holds_the_expected_distance_of_as_many_images(rng, reference) -> None:
    scores = []
    for _ in range(100):
        running = RunningDistance(reference)
        running.add(rng.standard_normal((400, 4)) + 0.5)
        scores.append(running.score())
    expected = np.mean([score.fid for score in scores])
    assert 88 <= sum(score.low <= expected <= score.high for score in scores) <= 100


def test_a_distance_near_zero_has_no_interval_below_it(rng) -> None:
    features = rng.standard_normal((400, 4))
    running = RunningDistance(FrechetStatistics.of(features))
    running.add(features)
    assert running.score().low == 0
    assert running.score().fid == pytest.approx(0, abs=1e-9)


def test_scores_are_due_at_twice_the_features_and_doubled() -> None:
    assert score_marks(50_000, num_features=2048) == [4096, 8192, 16384, 32768, 50_000]
    assert score_marks(256, num_features=128) == [256]
    assert score_marks(10, num_features=128) == [10]
    assert str(RunningScore(12_800, 35.123, 33.0, 37.2)) == "FID 35.12 \u00b1 2.1 (95 %) of 12,800"


def test_scores_of_stretches_in_any_order_are_those_of_the_images_in_order(rng, reference) -> None:
    """A score is due when its images are there without a gap, and takes none of those that came too early."""
    features = rng.standard_normal((43, 4)) + 0.3
    scores, due = RunningScores(reference, count=43), []
    for first, last in ((30, 43), (3, 9), (0, 3), (9, 10), (12, 30), (10, 12)):
        due.append(scores.add(first, features[first:last]))
    assert [[score.num_images for score in found] for found in due] == [[], [], [8], [], [], [16, 32, 43]]
    for score in (score for found in due for score in found):
        alone = RunningDistance(reference)
        alone.add(features[: score.num_images])
        expected = alone.score()
        assert (score.fid, score.high) == pytest.approx((expected.fid, expected.high), rel=1e-9)


def test_a_spool_gives_back_what_was_seen_and_keeps_it_out_of_memory(tmp_path, rng, reference) -> None:
    seen = rng.standard_normal((500, 4)).astype(np.float32)
    log_p = np.log(np.full((500, 3), 1 / 3))

    def peak(batches: int) -> int:
        (tmp_path / str(batches)).mkdir()
        tracemalloc.start()
        spool, running = Spool(tmp_path / str(batches), count=500 * batches), RunningDistance(reference)
        for _ in range(batches):
            spool.add(Extracted(seen, log_p))
            running.add(spool.extracted.features[running.count :])
        assert np.array_equal(spool.extracted.features, np.tile(seen, (batches, 1)))
        assert spool.extracted.log_probabilities.shape == (500 * batches, 3)
        assert running.count == 500 * batches
        used = tracemalloc.get_traced_memory()[1] - 500 * batches * 4 * 5  # np.tile and the comparison
        tracemalloc.stop()
        return used

    assert peak(200) < 2 * peak(5) + 100_000
    with pytest.raises(ValueError, match="no images"):
        _ = Spool(tmp_path, count=5).extracted
