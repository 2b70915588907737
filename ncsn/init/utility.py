"""Whether a first config asks if its images help a classifier, and how much of it fits the time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ncsn.config.schema import UtilityConfig
from ncsn.evaluation.learner import RATES, TRIED, network_for
from ncsn.evaluation.utility import LEAST_OF_CLASS, NAMED_IMAGES, unbalanced
from ncsn.init.draft import Draft
from ncsn.report.words import duration

LEAST_UPDATES, MOST_UPDATES = 400, 4000  # with fewer, a classifier has hardly begun; more gain nothing on small sets
_RATIOS = ((0.25, 0.5, 1.0), (0.25, 0.5), (0.25,))  # the most that fit
_BASICS = 3  # arms of no ratio
_MEASURED = 4  # updates


def can_tell(train: Sequence[float], test: Sequence[float]) -> bool:
    """Whether classes of these numbers of images have enough to tell."""
    return sum(count >= NAMED_IMAGES for count in test) >= 2 and min(*train, *test) >= LEAST_OF_CLASS


def choose_utility(
    draft: Draft, train: Sequence[float], test: Sequence[float], *, seconds: float, seconds_per_image: float
) -> float:
    """The section `utility` for classes of these numbers of images, or why there is none; the seconds that it takes.

    `seconds` are what it may take, `seconds_per_image` what all workers together take to generate one.
    """
    if draft.get("data.num_classes") is None:
        return 0.0
    why = f"Not asked whether the images help a classifier: fewer than two classes have {NAMED_IMAGES} test images."
    if can_tell(train, test):
        usual, workers = UtilityConfig(), draft.get("compute.num_workers")
        each = seconds_per_update(draft, classes=len(train), batch_size=usual.batch_size) / workers
        balancing = unbalanced(train)
        for ratios in _RATIOS:
            images = sum(max(max(ratios) * count, (max(train) - count) * balancing) for count in train)
            trainings = usual.seeds * (_BASICS + len(ratios) + 2 * balancing) + TRIED * len(RATES)
            generating = images * seconds_per_image
            updates = min(MOST_UPDATES, int((seconds - generating) / (each * trainings)))
            if updates >= LEAST_UPDATES:
                why = f"For {math.ceil(images):,} generated images and {trainings} classifiers."
                draft.choose("utility.updates", updates // 100 * 100, why)
                draft.choose("utility.ratios", list(ratios))
                return float(generating + trainings * each * updates)
        why = f"Not asked whether the images help a classifier: it takes longer than {duration(seconds)}."
    draft.choose("utility", None, why)
    return 0.0


def seconds_per_update(draft: Draft, *, classes: int, batch_size: int) -> float:
    """Of one classifier, by a few updates here."""
    size, channels = draft.get("data.image_size"), draft.get("data.channels")
    height, width = [size, size] if isinstance(size, int) else size
    device = "cuda" if draft.get("compute.use_gpu") else "cpu"
    network = network_for((height, width, channels), classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), RATES[0])
    x, labels = torch.randn(batch_size, channels, height, width, device=device), torch.zeros(batch_size).long()
    seconds = []
    for _ in range(_MEASURED):
        started = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels.to(device)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seconds.append((time.process_time() - started) / torch.get_num_threads())
    return min(seconds)
