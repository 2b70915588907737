"""Costs and estimates from given rates, and a plan from a real trial run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from refused import refused

from ncsn.config import Config, from_yaml
from ncsn.data.parquet import write_dataset
from ncsn.data.sources.known import open_source
from ncsn.runs import costs
from ncsn.runs.costs import Prices, cost_of, load_prices, total
from ncsn.runs.folder import run_folder
from ncsn.runs.steps import STEPS
from ncsn.steps.step import Step
from ncsn.steps.train import TrainResult
from ncsn.tools import trial_run
from ncsn.tools.planning import (
    Counts,
    Rates,
    estimate,
    num_checkpoints,
    predict,
    step_seconds,
)

CONFIGS = Path(__file__).parents[2] / "configs"
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
TABLE = (
    "{currency: EUR, cpu_core_hour: 0.1, gpu_hour: 2, storage_gb_month: 0.5, watts_per_cpu_core: 10, "
    "watts_per_gpu: 500, power_overhead: 1.5}"
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


def test_measurements_that_are_asked_for_take_time() -> None:
    measured = ("train.validation={images: 30, samples: 100}", "train.checkpoint_every_images=500")
    by_loss = step_seconds(config(*measured), COUNTS, RATES)["train"]
    # Thirty images of both splits at ten levels, at two checkpoints, three forward passes in a training step.
    assert by_loss == pytest.approx(10 + 1024 * 0.5 + 2 * 7 + 2 * 10 * 60 * 0.5 / 3)
    by_samples = step_seconds(config(*measured, "train.best_by=fid"), COUNTS, RATES)["train"]
    assert by_samples - by_loss == pytest.approx(2 * (3 * 21 * 0.1 + 50 * 0.001))


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


def test_a_plan_notes_noise_that_the_network_never_sees() -> None:
    assert estimate(config(), COUNTS, RATES, PRICES)["notes"] == []
    lognormal = "noise={sigma_1: %s, sigma_L: 0.01, training: {kind: lognormal}}"
    (note,) = estimate(config(lognormal % 8, "train.num_images=800000"), COUNTS, RATES, PRICES)["notes"]
    assert note.startswith("noise.sigma_1 = 8 ") and " 5.67" in note
    # Up to that of Karras et al., 1.33 times.
    for known in (5, 7.5):
        assert estimate(config(lognormal % known, "train.num_images=800000"), COUNTS, RATES, PRICES)["notes"] == []
    # The source of another start has seen more, and a training too short to know anything says nothing.
    continued = config(lognormal % 8, "train.num_images=800000", "train.init_from=models:/digits@champion")
    assert estimate(continued, COUNTS, RATES, PRICES)["notes"] == []


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
    averaged = estimate(config("train.ema={kind: power}"), COUNTS, RATES, PRICES)["storage"]
    assert averaged["checkpoints_gb"] == pytest.approx(6.0 + 16 / 5 * 2.0), "and 16 snapshots of two averages"
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


@pytest.mark.parametrize(
    ("name", "parameters", "gflop", "rate", "hours", "sample_minutes"),
    [
        ("cifar10_edm", 55_733_891, 127.1413, 3_113, 17.8, 9.4),
        ("cifar10_edm_class", 55_735_299, 127.1413, 3_113, 17.8, 9.4),
        ("celeba64_edm", 61_805_571, 251.17, 1_576, 35.3, 2.8),
    ],
)
def test_the_recipes_are_predicted_by_arithmetic(
    name: str, parameters: int, gflop: float, rate: float, hours: float, sample_minutes: float
) -> None:
    """At 40 % of the 989.4 TFLOP/s of an H100: 17.8 hours of CIFAR-10 are 2.54e19 FLOP."""
    recipe = from_yaml((CONFIGS / f"{name}.yaml").read_text())
    found = predict(recipe, PRICES, tflops=0.4 * 989.4)
    assert found["parameters"] == parameters
    assert found["gflop"]["train"] == pytest.approx(gflop, rel=1e-4)
    assert found["gflop"]["train"] == pytest.approx(3 * found["gflop"]["sample"])
    assert found["images_per_second"] == pytest.approx(rate, rel=1e-3)
    train, sample = found["steps"]["train"], found["steps"]["sample"]
    assert train["gpu_hours"] == pytest.approx(hours, abs=0.05)
    assert sample["seconds"] / 60 == pytest.approx(sample_minutes, abs=0.05)
    assert train["money"] == pytest.approx(train["gpu_hours"] * (PRICES.gpu_hour + PRICES.cpu_core_hour))
    assert 16 * parameters < 1e9 * found["worker_gb"] < 80e9


def test_gpus_share_the_features() -> None:
    alone = step_seconds(config("compute.use_gpu=true", "compute.num_workers=1"), COUNTS, RATES)["evaluate"]
    shared = step_seconds(config("compute.use_gpu=true"), COUNTS, RATES)["evaluate"]
    assert alone - shared == pytest.approx(650 * 0.001 / 2)


def test_prices_come_from_a_file_or_from_the_package(tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text(TABLE)
    assert load_prices(str(tmp_path / "prices.yaml")) == PRICES
    assert load_prices().currency == "USD"


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("{currency: EUR}", ""),
        ("[1, 2]", ""),
        ("{a: [", ""),
        ("{currency: 2020-13-45}", ""),
        (TABLE.replace("cpu_core_hour: 0.1", "cpu_core_hour: -1"), ":cpu_core_hour"),
    ],
)
def test_a_wrong_price_table_is_refused(tmp_path: Path, text: str, setting: str) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    with refused(f"{tmp_path / 'prices.yaml'}{setting}"):
        load_prices(str(tmp_path / "prices.yaml"))


TINY = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3}
noise: {num_levels: 4}
network: {kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 16, num_images: 160000, checkpoint_every_images: 80000, report_every_images: 800}
sampling: {num_images: 90, batch_size: 20, sampler: {kind: annealed_langevin, steps_per_level: 2}}
evaluation: {classifier_epochs: 3}
"""


def tiny(root: Path, *overrides: str) -> Config:
    return from_yaml(TINY, overrides=[f"storage.root={root}", *overrides])


@pytest.mark.slow
def test_a_trial_run_measures_each_step_and_leaves_only_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    parts: list[str] = []
    made = trial_run.run(tiny(tmp_path), run="planned", prices=load_prices(), report=parts.append)
    assert parts == ["start", *STEPS]
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [
        "runs/planned/plan.json"
    ]
    assert json.loads((tmp_path / "runs" / "planned" / "plan.json").read_text()) == made
    assert made["counts"] == {"train_images": 1258, "test_images": 539, "shards": 5, "nfe": 9}
    rates = made["rates"]
    assert all(rates["fixed"][step] > 0 for step in STEPS)
    measured = ("train_image", "sample_evaluation", "classifier_image", "extract_image")
    measured += ("neighbour_image", "checkpoint_bytes")
    assert all(rates[name] > 0 for name in measured)
    assert 1e-5 < rates["train_image"] < 1.0
    assert 5e7 < rates["worker_bytes"] < rates["machine_bytes"]
    training = made["steps"]["train"]["seconds"]
    assert training == pytest.approx(rates["fixed"]["train"] + 160000 * rates["train_image"] + 2 * rates["checkpoint"])
    assert made["memory"]["fits"]


def test_a_trial_training_is_split_into_images_checkpoint_and_the_rest() -> None:
    """Intervals of 10, 2 and 2 seconds, of which the first warms up; the loop took 20 seconds and the step 30."""
    points = [(100, 10.0), (200, 50.0), (300, 50.0)]
    image, checkpoint, around = trial_run.training_seconds(points, loop=20.0, step=30.0)
    assert image == pytest.approx(4 / 200)
    assert checkpoint == pytest.approx(20 - 14)
    assert around == pytest.approx(30 - 300 * image - checkpoint)


def test_a_trial_training_is_whole_report_intervals(tmp_path: Path) -> None:
    data = tiny(tmp_path, "data.max_images=100").data
    dataset = write_dataset(open_source(data), str(tmp_path), name="digits", data=data).uri
    chosen = trial_run.train_length(tiny(tmp_path), dataset)
    stretch = chosen["train.report_every_images"]
    assert stretch % 16 == 0
    assert chosen["train.num_images"] == chosen["train.checkpoint_every_images"] == trial_run.REPORTS * stretch
    assert trial_run.LEAST_STEPS <= chosen["train.num_images"] / 16 <= trial_run.MOST_STEPS


def test_counts_are_those_of_the_source(tmp_path: Path) -> None:
    counts = trial_run.count(tiny(tmp_path, "data.max_images=100", "sampling.num_images=41"))
    assert (counts.train_images, counts.test_images, counts.shards, counts.nfe) == (100, 100, 3, 9)


def test_account_is_the_sum_of_all_calls_beside_the_plan(tmp_path: Path) -> None:
    experiment = tiny(tmp_path, "compute.num_workers=2")
    folder = run_folder(experiment, "run")
    assert costs.account(experiment, run="run")["actual"]["steps"] == {}
    planned = {"prices": asdict(load_prices()) | {"currency": "EUR"}, "steps": {"train": {"seconds": 5.0}}}
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "plan.json").write_text(json.dumps(planned))
    (tmp_path / "runs" / "run" / "steps" / "train").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "steps" / "train" / "spent.json").write_text('{"seconds": 1000.0}')

    with pytest.raises(RuntimeError), Step("train", folder, TrainResult, unit="images").timed():
        raise RuntimeError("lost a worker")
    found = costs.account(experiment, run="run")
    seconds = found["actual"]["steps"]["train"]["seconds"]
    assert 1000.0 <= seconds < 1060.0
    assert found["actual"]["steps"]["train"]["cpu_hours"] == pytest.approx(2 * seconds / 3600)
    assert found["actual"]["total"]["seconds"] == seconds
    assert found["plan"] == planned
    assert found["prices"]["currency"] == "EUR"
