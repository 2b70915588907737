"""Costs and estimates by hand-made rates, whose sums can be done on paper."""

from __future__ import annotations

from pathlib import Path

import pytest
from refused import refused

from ncsn.config import Config, from_yaml
from ncsn.runs.costs import Prices, cost_of, load_prices, total
from ncsn.tools.planning import STEPS, Counts, Rates, estimate, num_checkpoints, step_seconds

CONFIG = """
name: plan
data: {source: sklearn_digits, image_size: 8, channels: 1}
network: {kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 64, num_images: 1000, checkpoint_every_images: 400, report_every_images: 64, keep_checkpoints: 2}
sampling: {num_images: 100, batch_size: 20, sampler: {kind: annealed_langevin, steps_per_level: 2, epsilon: 1.0e-4}}
evaluation: {classifier_epochs: 3}
compute: {num_workers: 2, cpus_per_worker: 4}
"""
COUNTS = Counts(train_images=500, test_images=50, shards=5, nfe=21)
RATES = Rates(
    cluster_start=4.0,
    process_start=2.0,
    fixed={"ingest": 1.0, "train": 10.0, "sample": 5.0, "evaluate": 3.0, "register": 2.0, "report": 1.0},
    ingest_image=0.01,
    train_image=0.5,
    checkpoint=7.0,
    sample_evaluation=0.1,
    classifier_image=0.02,
    extract_image=0.001,
    neighbour_image=0.004,
    worker_bytes=3e9,
    machine_bytes=8e9,
    dataset_image_bytes=1e6,
    checkpoint_bytes=2e9,
    sample_bytes=1e5,
)
PRICES = Prices("EUR", cpu_core_hour=0.1, gpu_hour=2.0, storage_gb_month=0.5, watts_per_cpu_core=10.0,
                watts_per_gpu=500.0, power_overhead=1.5)  # fmt: skip


def config(*overrides: str) -> Config:
    return from_yaml(CONFIG, overrides=overrides)


def test_seconds_of_each_step() -> None:
    seconds = step_seconds(config(), COUNTS, RATES)
    assert seconds == pytest.approx(
        {
            "ingest": 1 + 550 * 0.01,
            "train": 10 + 1024 * 0.5 + 3 * 7,  # sixteen whole batches; checkpoints at 400, 800 and the end
            "sample": 5 + 3 * 21 * 0.1,  # five shards on two workers are three waves
            "evaluate": 3 + 3 * 500 * 0.02 + (500 + 100 + 50) * 0.001 + 2 * 500 * 0.004,
            "register": 2,
            "report": 1,
        }
    )


def test_checkpoints_are_counted_with_the_last() -> None:
    assert num_checkpoints(config()) == 3
    assert num_checkpoints(config("train.checkpoint_every_images=500")) == 2
    assert num_checkpoints(config("train.checkpoint_every_images=5000")) == 1


def test_cost_is_of_what_is_reserved() -> None:
    training = cost_of(config(), "train", 1800.0, PRICES)
    assert (training.cpu_hours, training.gpu_hours) == (4.0, 0.0)
    assert training.money == pytest.approx(0.4)
    assert training.kwh == pytest.approx(4 * 10 * 1.5 / 1000)
    evaluating = cost_of(config("compute.use_gpu=true"), "evaluate", 3600.0, PRICES)
    assert (evaluating.cpu_hours, evaluating.gpu_hours) == (8.0, 2.0)
    registering = cost_of(config("compute.use_gpu=true"), "register", 3600.0, PRICES)
    assert (registering.cpu_hours, registering.gpu_hours) == (4.0, 0.0)
    on_gpus = cost_of(config("compute.use_gpu=true"), "train", 3600.0, PRICES)
    assert on_gpus.gpu_hours == 2.0
    assert on_gpus.money == pytest.approx(8 * 0.1 + 2 * 2.0)
    assert on_gpus.kwh == pytest.approx((8 * 10 + 2 * 500) * 1.5 / 1000)
    both = total({"a": training, "b": on_gpus})
    assert both.seconds == 5400.0 and both.money == pytest.approx(training.money + on_gpus.money)


def test_plan_has_time_memory_and_storage() -> None:
    plan = estimate(config(), COUNTS, RATES, PRICES)
    assert tuple(plan["steps"]) == STEPS
    assert plan["total"]["seconds"] == pytest.approx(sum(step_seconds(config(), COUNTS, RATES).values()))
    assert plan["start_seconds"] == 4 + 7 * 2
    assert plan["memory"] == {"worker_gb": 3.0, "workers_gb": 6.0, "machine_gb": 8.0, "fits": True}
    assert not estimate(config("compute.num_workers=4"), COUNTS, RATES, PRICES)["memory"]["fits"]
    store = plan["storage"]
    assert store["dataset_gb"] == pytest.approx(0.55)
    assert store["checkpoints_gb"] == pytest.approx(6.0), "two of three are kept, and the best"
    assert store["samples_gb"] == pytest.approx(0.01)
    assert store["money_per_month"] == pytest.approx(6.56 * 0.5)
    assert store["node_cache_gb"] == pytest.approx(550 * 64 / 1e9)


def test_pods_are_planned_where_there_are_pods() -> None:
    assert estimate(config(), COUNTS, RATES, PRICES)["pods"] is None
    pods = ("compute.backend=kuberay", "compute.kuberay.workers_per_pod=2", "compute.use_gpu=true")
    given = estimate(config(*pods, "compute.kuberay.memory_per_worker=3G"), COUNTS, RATES, PRICES)["pods"]
    assert given == {"count": 1, "workers": 2, "cpus": 8, "gpus": 2, "memory_gb": 6.0}
    estimated = estimate(config(*pods), COUNTS, RATES, PRICES)["pods"]
    assert estimated["memory_gb"] == pytest.approx(2 * 7.5 * 2**30 / 1e9)


def test_gpus_share_the_features() -> None:
    alone = step_seconds(config("compute.use_gpu=true", "compute.num_workers=1"), COUNTS, RATES)["evaluate"]
    shared = step_seconds(config("compute.use_gpu=true"), COUNTS, RATES)["evaluate"]
    assert alone - shared == pytest.approx(650 * 0.001 / 2)


def test_prices_come_from_a_file_of_ones_own(tmp_path: Path) -> None:
    table = tmp_path / "prices.yaml"
    table.write_text(
        "{currency: EUR, cpu_core_hour: 0.1, gpu_hour: 2, storage_gb_month: 0.5, watts_per_cpu_core: 10, "
        "watts_per_gpu: 500, power_overhead: 1.5}"
    )
    assert load_prices(str(table)) == PRICES
    assert load_prices().currency == "USD"


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("{currency: EUR}", ""),
        ("[1, 2]", ""),
        ("{a: [", ""),
        (
            "{currency: EUR, cpu_core_hour: -1, gpu_hour: 2, storage_gb_month: 0.5, watts_per_cpu_core: 10, "
            "watts_per_gpu: 500, power_overhead: 1.5}",
            ":cpu_core_hour",
        ),
    ],
)
def test_a_wrong_price_table_is_refused(tmp_path: Path, text: str, setting: str) -> None:
    table = tmp_path / "prices.yaml"
    table.write_text(text)
    with refused(f"{table}{setting}"):
        load_prices(str(table))
