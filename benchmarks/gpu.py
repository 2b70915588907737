"""The rows of the GPU, in under nine minutes: the training step, its growth with the batch, and sampling.

Needs only torch, numpy and ncsn.core.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.measure import Row, in_turns, own_process
from benchmarks.training_step import (
    FEATURES,
    LEVELS,
    SIZE,
    STEPS_ON_GPU,
    loss_curves,
    measure,
    prepare_ours,
    synchronise,
)
from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.networks.refinenet import NcsnNetwork
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.langevin import annealed_langevin

BUDGET_SECONDS = 480.0  # no part starts after it
BATCH = 128


def parts(
    *, device: str = "cuda", batches: tuple[int, ...] = (8, 32, 128, 512), steps: int = 500
) -> list[Callable[[], list[Row]]]:
    """Functions that measure the rows; when the budget from now is spent, a function returns none."""
    where, began = torch.device(device), time.perf_counter()
    step = partial(measure, device=where, batch=BATCH, rounds=20, speedup=4.0, share_of_peak=40.0)
    wanted: list[Callable[[], list[Row]]] = [
        partial(step, compiled=False),
        partial(step, compiled=True),
        lambda: [sampling(where, images=256, steps_per_level=10, num_features=FEATURES)],
        *(partial(growth, where, batch=batch) for batch in batches),
        lambda: [loss_curves(device=where, batch=BATCH, steps=steps, num_features=FEATURES)],
    ]

    def in_time(part: Callable[[], list[Row]]) -> list[Row]:
        return part() if time.perf_counter() - began < BUDGET_SECONDS else []

    return [partial(in_time, part) for part in wanted]


def growth(device: torch.device, *, batch: int) -> list[Row]:
    """Images per second of a step, eager, at a batch size."""
    with own_process(prepare_ours, str(device), batch, "eager") as steps:
        seconds = statistics.median(in_turns({"steps": steps}, rounds=5)["steps"])
    speed = batch * STEPS_ON_GPU / seconds
    return [Row("growth", f"training images/s, {torch.cuda.get_device_name(device)}, batch {batch}", speed, "images/s")]


def sampling(device: torch.device, *, images: int, steps_per_level: int, num_features: int) -> Row:
    """Evaluations per second of annealed Langevin dynamics with the paper's network in bfloat16."""
    torch.manual_seed(0)
    network = NcsnNetwork(num_features, channels=1, num_levels=LEVELS).to(device).eval()
    sigmas = geometric_sigmas(1.0, 0.01, LEVELS).float().to(device)

    def sample() -> None:
        noise = KeyedNoise(0, first=0, count=images, shape=(1, SIZE, SIZE), device=device)
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
            annealed_langevin(
                network,
                x=noise.uniform(0),
                sigmas=sigmas,
                epsilon=2e-5,
                steps_per_level=steps_per_level,
                noise=noise,
                denoise=False,
            )
        synchronise(device)

    seconds = statistics.median(in_turns({"sampler": sample}, rounds=3)["sampler"])
    speed = images * LEVELS * steps_per_level / seconds
    return Row(
        "sampling",
        f"annealed Langevin, ncsn, 28x28, {num_features} channels, {images} images at once: evaluations/s",
        speed,
        unit="/s",
        detail=f"{1e6 / speed:,.0f} s for 1,000 images at 1,000 evaluations each",
    )
