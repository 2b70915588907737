"""The arithmetic of the benchmarks."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch.nn import functional

from benchmarks import judges, roofline
from benchmarks.measure import in_turns, ratio
from ncsn.config import from_yaml
from ncsn.data.format import Rows

CONFIGS = Path(__file__).parents[1] / "configs"
GPU_RECIPES = [path for path in sorted(CONFIGS.glob("*.yaml")) if "use_gpu: true" in path.read_text()]


def test_a_ratio_is_the_median_over_rounds() -> None:
    ticks = itertools.accumulate([0, 2, 0, 1, 0, 60, 0, 20, 0, 5, 0, 1])  # start and end of each timed call
    seconds = in_turns({"slow": lambda: None, "fast": lambda: None}, rounds=3, clock=lambda: float(next(ticks)))
    assert seconds == {"slow": [2, 60, 5], "fast": [1, 20, 1]}
    assert ratio(seconds, "slow", "fast") == 3


def test_half_of_what_a_gpu_allows_is_what_nvidia_s_resnet_50_reaches() -> None:
    with torch.device("meta"):
        network, images, labels = torchvision.models.resnet50(), torch.empty(256, 3, 224, 224), torch.zeros(256).long()
    with roofline.Work(256) as work:
        functional.cross_entropy(network(images), labels).backward()
    assert work.flop == pytest.approx(3 * 2 * 4.09e9, rel=0.02)  # less the gradient of the images
    assert 1 / work.seconds("a100", precision="float32") == pytest.approx(2_470 / 2, rel=0.02)


# Each takes seconds, so that `make test` has one.
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem == "mnist" else pytest.mark.slow) for path in GPU_RECIPES],
    ids=lambda path: path.stem,
)
def test_a_recipe_for_gpus_says_what_is_predicted_and_ends_in_time(path: Path) -> None:
    recipe = from_yaml(path.read_text())
    found = roofline.predict(recipe, gpu="h100")
    hours = found["steps"]["train"]["seconds"] / 3600
    said = re.search(r"Predicted, not measured: ([\d.]+) hours on (\w+) H100", path.read_text())
    assert said and float(said[1]) == pytest.approx(hours, rel=0.02, abs=0.05)
    assert {"one": 1, "two": 2, "four": 4}[said[2]] == recipe.compute.max_workers
    for cost in found["steps"].values():
        assert cost["seconds"] / 3600 < recipe.compute.kuberay.max_hours
    assert 16 * found["parameters"] < 1e9 * found["worker_gb"] < 80e9


@pytest.mark.parametrize("body", judges.BODIES)
def test_a_judge_finds_half_of_the_digits_near_the_other_and_noise_far(body: str) -> None:
    digits = load_digits()
    images, labels = (digits.images[..., None] * 15.9375).astype(np.uint8), digits.target.astype(np.int64)
    train, test = (Rows(images[part::2], labels[part::2]) for part in (0, 1))
    seat = judges.Seat.of(judges.train_judge(body, train, num_classes=10, seed=0, steps=100), train, test)
    assert seat.accuracy > 0.8
    real = seat.real()
    noise = seat.judged(np.random.default_rng(0).integers(256, size=(2000, 8, 8, 1)).astype(np.uint8))
    assert (real["count"], noise["count"]) == (len(test), 2000)
    assert real["equal"] < 2 and noise["all"] > 20, "in percent of the variance"
    assert noise["precision"] < 0.2 < 0.6 < real["precision"]
    assert real["shares"] < 0.1 < noise["shares"], "noise looks like few of the digits"
    again = seat.again(5000)
    assert again["all"] < again["equal"] < real["equal"], "less of more images, and of those that it has answers_of"


def test_the_interval_of_judges_is_by_the_spread_of_all_recipes_between_seeds_or_by_the_jackknife() -> None:

    def line(change: str, seed: int, *logs: float, own: float = 0.01) -> dict:
        by = [{"all": float(np.exp(log)), "all_log_std": own} for log in logs]
        return {"change": change, "images": 1, "seed": seed, "by": by}

    first = [line("a", 1, 0.0, 0.2), line("a", 2, 0.2, 0.4)]  # means 0.1 and 0.3
    second = [line("b", seed, mean) for seed, mean in enumerate([1.0, 1.2, 1.4])]
    # Squares of 0.02 and 0.08 over three degrees of freedom, whose quantile is 3.182.
    half = 3.182 * (0.1 / 3) ** 0.5
    found = judges.interval(second, [*first, *second])
    assert np.log(found) == pytest.approx([1.2, 1.2 - half / 3**0.5, 1.2 + half / 3**0.5], rel=1e-3)
    alone = [line("c", 1, 0.5, own=0.3)]
    assert np.log(judges.interval(alone, alone)) == pytest.approx([0.5, 0.5 - 1.96 * 0.3, 0.5 + 1.96 * 0.3])
