"""Whether a first config asks if its images help a classifier, and how much of it fits the time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ncsn.config.schema import UtilityConfig
from ncsn.evaluation.utility import LEAST_OF_CLASS, NAMED_IMAGES
from ncsn.init.draft import Draft
from ncsn.init.plan import seconds_per_update, settled, work_of
from ncsn.report.words import duration

LEAST_UPDATES, MOST_UPDATES = 400, 4000  # with fewer, a classifier has hardly begun; more gain nothing on small sets
_RATIOS = ((0.25, 0.5, 1.0), (0.25, 0.5), (0.25,))  # the most that fit


def can_tell(train: Sequence[float], test: Sequence[float]) -> bool:
    """Whether classes of these numbers of images have enough to tell."""
    return sum(count >= NAMED_IMAGES for count in test) >= 2 and min(*train, *test) >= LEAST_OF_CLASS


def choose_utility(
    draft: Draft, train: Sequence[float], test: Sequence[float], *, seconds: float, seconds_per_image: float
) -> float:
    """The section `utility` for classes of these numbers of images, or why there is none; the seconds that it takes.

    `seconds` are what it may take, `seconds_per_image` what all workers together take to generate one.
    """
    not_asked = "Not asked whether the images help a classifier"
    why = f"{not_asked}: that needs data.num_classes, and two classes with {NAMED_IMAGES} test images."
    if draft.get("data.num_classes") is not None and can_tell(train, test):
        size, channels = draft.get("data.image_size"), draft.get("data.channels")
        shape = (*([size, size] if isinstance(size, int) else size), channels)
        device, workers = "cuda" if draft.get("compute.use_gpu") else "cpu", draft.get("compute.num_workers")
        cores = draft.get("compute.cpus_per_worker", 1)
        each = seconds_per_update(UtilityConfig(), shape, classes=len(train), device=device, cores=cores)
        each = settled(each, "update", shape, len(train), device, cores) / workers
        for ratios in _RATIOS:
            images, trainings = work_of(UtilityConfig(ratios=ratios), train)
            generating = images * seconds_per_image
            updates = min(MOST_UPDATES, int((seconds - generating) / (each * trainings)))
            if updates >= LEAST_UPDATES:
                why = f"For {math.ceil(images):,} generated images and {trainings} classifiers."
                draft.choose("utility.updates", updates // 100 * 100, why)
                draft.choose("utility.ratios", list(ratios))
                return float(generating + trainings * each * updates)
        why = f"{not_asked}: it takes longer than {duration(seconds)}. `ncsn utility` asks later."
    draft.choose("utility", None, why)
    return 0.0
