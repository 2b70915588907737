"""Whether generated images help, from answers alone: known differences, and intervals that cover the truth."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ncsn.evaluation.utility import NAMED_IMAGES, arm_of, compare
from ncsn.evaluation.utility_training import network_for
from ncsn.report.words import utility_sentence
from ncsn.runs.metrics import Estimate

SEEDS = 5


def labels_of(*counts: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(counts)), counts)


def answers_of(right: NDArray[np.bool_], labels: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    return np.where(right, labels, (labels + 1) % num_classes)


def test_every_class_counts_alike() -> None:
    labels = labels_of(90, 10)
    right = np.tile(labels == 0, (SEEDS, 1))  # all of the large class, none of the small one
    found = arm_of("real", answers_of(right, labels, 2), labels, num_classes=2)
    assert (found.balanced_accuracy.value, found.accuracy.value) == (50, 90)
    assert [each.value for each in found.recalls] == [100, 0] and found.recalls[0].high == 100
    assert found.macro_f1.value == pytest.approx(50 * 180 / 190)
    assert found.accuracy.low < 90 < found.accuracy.high


def test_macro_f1_has_the_spread_of_drawn_test_images() -> None:
    rng, labels = np.random.default_rng(0), labels_of(60, 30, 30)
    hits, guesses = np.array([0.9, 0.7, 0.5])[labels], rng.integers(0, 3, (400, 120))
    drawn = np.where(rng.random((400, 120)) < hits, labels, guesses)
    each = [arm_of("real", np.tile(answers, (2, 1)), labels, num_classes=3).macro_f1 for answers in drawn]
    reach = np.mean([f1.value - f1.low for f1 in each]) / 12.706  # Student's t with one degree
    assert reach == pytest.approx(np.std([f1.value for f1 in each]), rel=0.15)


def test_the_better_ratio_is_judged_by_other_images_and_seeds() -> None:
    """Of equal arms one has more luck with images and seeds, none of which judge what they chose."""
    rng, gains, best = np.random.default_rng(0), list[float](), list[float]()
    labels = labels_of(40, 40)
    for _ in range(200):
        base, *arms = (
            answers_of(rng.random(80) < 0.7 + 0.2 * rng.normal(size=(SEEDS, 1)), labels, 2) for _ in range(5)
        )
        found = compare(base, {str(k): arm for k, arm in enumerate(arms)}, labels, num_classes=2)
        gains.append(found.gain.value)
        best.append(100 * max(float((arm == labels).mean() - (base == labels).mean()) for arm in arms))
    assert abs(np.mean(gains)) < 1.5 < 4 < np.mean(best)


def test_a_class_is_named_if_it_surely_changed_and_has_images() -> None:
    labels = labels_of(100, 100, NAMED_IMAGES - 1)
    base = np.zeros((SEEDS, len(labels)), bool)
    helped = base | (labels == 1) | (labels == 2)
    found = compare(answers_of(base, labels, 3), {"1": answers_of(helped, labels, 3)}, labels, num_classes=3)
    assert (found.named, found.grade) == ([1], "helps")
    assert [round(each.value) for each in found.classes] == [0, 100, 100]
    same = compare(answers_of(base, labels, 3), {"1": answers_of(base, labels, 3)}, labels, num_classes=3)
    assert (same.named, same.grade, same.gain.value) == ([], "same", 0) and same.gain.high > 0.5


@pytest.mark.parametrize("effect", [0.0, 0.7])
@pytest.mark.parametrize(("num_classes", "images"), [(2, 20), (2, 400), (5, 100), (10, 20), (10, 1000)])
@pytest.mark.parametrize("ease", [0.0, 2.0, 5.0])  # logits: shares of right answers of 50, 75 and 96 %
def test_the_interval_covers_the_truth_as_often_as_it_says(
    num_classes: int, images: int, ease: float, effect: float
) -> None:
    """Answers are correlated: images are easy or hard for every classifier, and some seeds are better than others."""

    def share(logits: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1 / (1 + np.exp(-logits))

    rng, tables = np.random.default_rng(num_classes * images), 200
    labels = labels_of(*[images // num_classes] * num_classes)
    noise = 2 * rng.normal(size=100_000) * 0.8 + 0.2 * rng.normal(size=100_000) + 0.2 * rng.normal(size=100_000)
    truth = 100 * (share(ease + effect + noise) - share(ease + noise)).mean()
    covered = 0
    for _ in range(tables):
        common, own = 2 * rng.normal(size=images) * 0.8, 0.2 * rng.normal(size=(2, 1, images))
        of_seeds = 0.2 * rng.normal(size=(2, SEEDS, 1))
        logits = ease + np.array([0, effect])[:, None, None] + common + own + of_seeds
        base, helped = (answers_of(right, labels, num_classes) for right in rng.random(logits.shape) < share(logits))
        gain = compare(base, {"1": helped}, labels, num_classes=num_classes).gain
        covered += gain.low <= truth <= gain.high
    assert covered >= 0.92 * tables  # 0.95, less two deviations of 200 tables


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (48, 32, 3), (64, 64, 3), (128, 128, 4)])
def test_networks_take_images_of_any_size_one_by_one(shape: tuple[int, int, int]) -> None:
    network = network_for(shape, 5).eval()
    x = torch.randn(3, shape[2], *shape[:2])
    together = network(x)
    assert together.shape == (3, 5)
    torch.testing.assert_close(network(x[:1]), together[:1], atol=1e-4, rtol=1e-4)
    assert sum(each.numel() for each in network.parameters()) < (100_000 if max(shape) <= 48 else 12_000_000)


def test_the_sentence_has_the_numbers() -> None:
    gain, crack, dent = (Estimate(v, v - 1.2, v + 1.2) for v in (2.1, 9.0, -4.0))
    text = utility_sentence("helps", gain, {"dent": dent, "crack": crack}, used=9, wanted=9)
    assert text.startswith("Generated images: +2.1 ")
    assert all(each in text for each in ("(0.90 to 3.3)", "crack (+9)", "dent (-4)"))
    text = utility_sentence("same", Estimate(2.1, -4.2, 8.4), {}, used=50, wanted=50)
    assert text.startswith("Generated images: +2.1 ") and "(-4.2 to 8.4)" in text
    text = utility_sentence("same", Estimate(0.4, -0.6, 1.4), {"dent": dent}, used=30, wanted=50)
    assert all(each in text for each in (" 1.4 points", "(-0.60 to 1.4)", "dent (-4)", " 20 of 50 "))
