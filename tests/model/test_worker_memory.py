"""The estimate of a worker's memory follows the network, the batch, the machine and the extractor."""

from __future__ import annotations

from pathlib import Path

import pytest

from ncsn.config import Config, from_yaml
from ncsn.model.memory import worker_memory

CIFAR10 = (Path(__file__).parents[2] / "configs" / "cifar10_unet.yaml").read_text()
GIB = 2**30


def cifar10(*overrides: str) -> Config:
    settings = ["evaluation.weights=/weights.pth", "compute.use_gpu=false", "compute.num_workers=1", *overrides]
    return from_yaml(CIFAR10, overrides=settings)


def test_training_on_a_cpu_holds_the_feature_maps_of_its_share() -> None:
    """Measured on one core: 72 MB for each image of a batch plus 0.7 GB, before anything is saved."""
    whole = worker_memory(cifar10("train.batch_size=64"), "train")
    half = worker_memory(cifar10("train.batch_size=64", "compute.num_workers=2"), "train")
    micro = worker_memory(cifar10("train.batch_size=64", "compute.microbatch=32"), "train")
    assert half == micro
    assert whole - half == pytest.approx(1.25 * 32 * 72e6, rel=0.2)
    assert whole > 64 * 72e6 + 0.7e9 + GIB


def test_images_on_a_gpu_are_not_in_the_hosts_memory() -> None:
    sizes = {worker_memory(cifar10("compute.use_gpu=true", f"train.batch_size={n}"), "train") for n in (64, 512)}
    assert len(sizes) == 1
    assert 5 * GIB <= sizes.pop() <= 12 * GIB


def test_evaluation_holds_the_reference() -> None:
    few, many = (
        worker_memory(cifar10("compute.use_gpu=true"), "evaluate", reference_images=count) for count in (10**4, 10**6)
    )
    assert many - few > 990_000 * 2048 * 4
    batch = worker_memory(cifar10("evaluation.batch_size=1024"), "evaluate", reference_images=10**4)
    assert batch > worker_memory(cifar10("evaluation.batch_size=64"), "evaluate", reference_images=10**4)


def test_a_small_experiment_gets_the_least() -> None:
    digits = from_yaml((Path(__file__).parents[2] / "configs" / "digits.yaml").read_text())
    assert {worker_memory(digits, step) for step in ("train", "sample", "evaluate", "search")} == {4 * GIB}
