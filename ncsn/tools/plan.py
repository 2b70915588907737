"""`ncsn plan`: what training and sampling will take, by a few measured steps or by the network's FLOP."""

from __future__ import annotations

import math
from typing import Any

from ncsn.config import Config
from ncsn.config.training import AutoNoiseConfig
from ncsn.core.noise_schedule import best_epsilon
from ncsn.core.samplers.settings import AnnealedLangevin
from ncsn.core.training import EVALUATIONS_PER_STEP
from ncsn.data.format import load_manifest
from ncsn.data.noise_levels import resolve_noise
from ncsn.errors import UserError
from ncsn.model import build
from ncsn.model.generate import evaluations_per_image
from ncsn.model.memory import kept_bytes
from ncsn.runs.folder import run_folder
from ncsn.runs.records import cost_of, read_result
from ncsn.tools.speed import Machine, Speed, forward_flop, measure_speed

_STATE_BYTES = 5 * 4  # per parameter in float32: weights, their average, gradients, and Adam's two moments


def with_levels(config: Config, run: str) -> Config:
    """The config with what `noise: auto` chooses for the run's dataset; as it is while the run has none."""
    ingested = read_result(run_folder(config, run), "ingest")
    return config if ingested is None else resolve_noise(config, load_manifest(str(ingested.result["uri"])))


def chosen_levels(config: Config, run: str) -> list[str]:
    """What `noise: auto` chooses for the run's dataset, for people; empty while the run has none."""
    levels = with_levels(config, run).noise
    if isinstance(levels, AutoNoiseConfig):
        return []
    lines = [f"noise: {{sigma_1: {levels.sigma_1:g}, sigma_L: {levels.sigma_L:g}, num_levels: {levels.num_levels}}}"]
    sampler = config.sampling.sampler
    if isinstance(sampler, AnnealedLangevin) and levels.num_levels > 1:
        ratio = (levels.sigma_1 / levels.sigma_L) ** (1 / (levels.num_levels - 1))
        steps = sampler.steps_per_level
        epsilon = best_epsilon(sigma_L=levels.sigma_L, ratio=ratio, steps_per_level=steps)
        lines.append(f"sampling.sampler.epsilon: {epsilon:.3g} fits {steps} steps per level (NCSNv2, technique 4)")
    return lines


def plan(config: Config, run: str, *, tflops: float | None, price_per_hour: float | None) -> dict[str, Any]:
    """Seconds, reserved hours and money of training and sampling, and a worker's memory, as plain values.

    `tflops` is the rate of each worker; without one, the speed of this machine is measured. `price_per_hour` is that of
    all workers together.
    """
    config = with_levels(config, run)
    if isinstance(config.noise, AutoNoiseConfig):
        raise UserError(
            "noise", "chosen from images that are not ingested yet", hint="run `ncsn ingest` first", value="auto"
        )
    compute, train, sampling = config.compute, config.train, config.sampling
    network = build.network(config).to("meta")  # on a CPU it takes shortcuts
    parameters = sum(parameter.numel() for parameter in network.parameters())
    flop, nfe = forward_flop(network, config), evaluations_per_image(config)
    if tflops is None:
        speed, basis = measure_speed(config), f"measured on this machine ({Machine.here()})"
    else:
        seconds = flop / (1e12 * tflops * compute.max_workers)
        speed, basis = Speed(EVALUATIONS_PER_STEP * seconds, seconds), f"{compute.max_workers} x {tflops:g} TFLOP/s"
    taken = {
        "train": train.num_images * speed.train_image,
        "sample": sampling.num_images * nfe * speed.evaluate_image,
    }
    together = compute.microbatch or math.ceil(train.batch_size / compute.max_workers)
    maps = kept_bytes(network, config) * together / (1 if train.precision == "float32" else 2)
    steps = {step: cost_of(config, step, seconds)._asdict() for step, seconds in taken.items()}
    if price_per_hour is not None:
        steps = {step: {**cost, "money": price_per_hour * taken[step] / 3600} for step, cost in steps.items()}
    return {
        "steps": steps,
        "basis": basis,
        "images_per_second": 1 / speed.train_image,
        "nfe": nfe,
        "parameters": parameters,
        "gflop": {"train": EVALUATIONS_PER_STEP * flop / 1e9, "sample": flop / 1e9},
        "worker_gb": (_STATE_BYTES * parameters + maps) / 1e9,
        "notes": build.noise_notes(config, images=train.num_images),
    }
