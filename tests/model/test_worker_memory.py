"""The estimate of a worker's memory follows the network, the batch, the machine and the extractor."""

from __future__ import annotations

from pathlib import Path

import pytest

from ncsn.config import Config, from_yaml
from ncsn.model.memory import worker_memory
from ncsn.runs.steps import STEP_TABLE

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30


def cifar10(*overrides: str) -> Config:
    settings = ["evaluation.weights=/weights.pth", "compute.use_gpu=false", "compute.num_workers=1", *overrides]
    return from_yaml((CONFIGS / "cifar10_unet.yaml").read_text(), overrides=settings)


def test_training_on_a_cpu_holds_the_feature_maps_of_its_share() -> None:
    """Measured on one core: 72 MB for each image of a batch plus 0.7 GB, before anything is saved."""
    whole, half, micro = (
        worker_memory(cifar10("train.batch_size=64", *more), ["training"])
        for more in ([], ["compute.num_workers=2"], ["compute.microbatch=32"])
    )
    assert half == micro
    assert whole - half == pytest.approx(1.25 * 32 * 72e6, rel=0.2)
    assert whole > 64 * 72e6 + 0.7e9 + GIB


def test_images_on_a_gpu_are_not_in_the_hosts_memory_but_the_reference_is() -> None:
    on_gpu = "compute.use_gpu=true"
    small, large = (worker_memory(cifar10(on_gpu, f"train.batch_size={n}"), ["training"]) for n in (64, 512))
    assert 5 * GIB <= small == large <= 12 * GIB
    few, many = (worker_memory(cifar10(on_gpu), ["features"], reference_images=n) for n in (10**4, 10**6))
    assert many - few > 990_000 * 2048 * 4
    few, many = (worker_memory(cifar10(f"evaluation.batch_size={n}"), ["features"]) for n in (64, 1024))
    assert many > few


def test_a_small_experiment_gets_the_least() -> None:
    digits = from_yaml((CONFIGS / "digits.yaml").read_text())
    assert {worker_memory(digits, step.workers) for step in STEP_TABLE.values()} == {4 * GIB}
