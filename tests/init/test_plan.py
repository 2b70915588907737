"""The estimate of `ncsn plan`, and what `noise: auto` stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
from do import do
from refused import refused

from ncsn.config import Config, from_yaml
from ncsn.init.plan import Speed, chosen_levels, estimate, plan, utility_line
from ncsn.report.words import duration
from ncsn.runs.record import cost_of

ANY = Speed(0.01, 0.002)
TINY = """
name: plan
data: {source: sklearn_digits, image_size: 8, channels: 1, max_images: 50}
network: {kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 64, num_images: 1000, checkpoint_every_images: 400, report_every_images: 64}
sampling: {num_images: 100, batch_size: 20, sampler: {kind: annealed_langevin, steps_per_level: 2, epsilon: 1.0e-4}}
compute: {num_workers: 2, cpus_per_worker: 4}
"""


@pytest.fixture(autouse=True)
def _measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncsn.init.plan.SECONDS", 0.001)


def config(*overrides: str) -> Config:
    return from_yaml(TINY, overrides=overrides)


def test_this_machine_is_measured() -> None:
    found, wide = plan(config(), "run"), plan(config("network.widths=[512]"), "run")
    assert found["steps"]["train"]["seconds"] == pytest.approx(1000 / found["images_per_second"])
    for step in ("train", "sample"):
        assert wide["steps"][step]["seconds"] > 2 * found["steps"][step]["seconds"]
    assert plan(config("loss={kind: ssm}"), "run")["gflop"]["train"] > 1.5 * found["gflop"]["train"]
    assert found["slowdown"] >= 1
    assert found["nfe"] == 21 and found["steps"]["train"].keys() == {"seconds", "cpu_hours", "gpu_hours"}
    with refused("compute.use_gpu"):
        plan(config("compute.use_gpu=true"), "run")


def test_utility_is_counted_once_the_classes_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncsn.init.plan.seconds_per_update", lambda *_, **__: 10.0)
    monkeypatch.setattr("ncsn.init.plan.measure_speed", lambda _: Speed(1e-3, 1e-3))
    asked = "data.num_classes=10", "data.max_images=300", f"storage.root={tmp_path}"
    one, two = (config(*asked, f"utility={{updates: {updates}}}") for updates in (1000, 2000))
    assert "utility" not in plan(one, "run")["steps"]
    do("ingest", one, "run")
    first, second = (plan(each, "run")["steps"]["utility"]["seconds"] for each in (one, two))
    assert second - first == pytest.approx(1000 * 10 * (5 * 6 + 6) / 2, rel=0.01)  # by two workers
    assert utility_line(config("data.max_images=300", f"storage.root={tmp_path}"), "run") == ""
    line = utility_line(two, "run")
    assert duration(second) in line and "utility.updates=500" in line and "utility.ratios=[0.25]" in line


def test_a_teacher_takes_time_and_memory_in_its_precision() -> None:
    def tuning(pairs: str, *more: str) -> Config:
        loss = f"loss={{kind: consistency, q: 2, stages: 8, pairs: {pairs}}}", "sampling.sampler={kind: consistency}"
        return config(*loss, "noise={training: {kind: lognormal}}", "train.init_from=a", *more)

    assert plan(tuning("teacher"), "run")["gflop"]["train"] > plan(tuning("image"), "run")["gflop"]["train"]
    for precision, value_bytes in (("float32", 4), ("bfloat16", 2)):
        given = f"train.precision={precision}", "compute.use_gpu=true"
        found, without = (estimate(tuning(pairs, *given), ANY, basis="") for pairs in ("teacher", "image"))
        added = found["worker_gb"] - without["worker_gb"]
        assert 1e9 * added == pytest.approx(value_bytes * found["parameters"])


def test_a_plan_notes_noise_that_the_network_never_sees() -> None:
    def notes(*overrides: str) -> list[str]:
        return estimate(config("train.num_images=800000", *overrides), ANY, basis="")["notes"]

    lognormal = "noise={sigma_1: %s, sigma_L: 0.01, training: {kind: lognormal}}"
    assert notes() == notes(lognormal % 5) == notes(lognormal % 7.5) == []
    assert len(notes(lognormal % 8)) == 1
    # The source of another start has seen more.
    assert notes(lognormal % 8, "train.init_from=models:/digits@champion") == []


def test_the_levels_of_noise_auto_are_known_once_there_is_a_dataset(tmp_path: Path) -> None:
    auto = config("noise=auto", f"storage.root={tmp_path}")
    assert chosen_levels(auto, "run") == []
    with refused("noise"):
        plan(auto, "run")
    do("ingest", auto, "run")
    levels, epsilon = chosen_levels(auto, "run")
    assert "sigma_1: " in levels and "2 steps per level" in epsilon
    assert plan(auto, "run")["nfe"] > 2


def test_cost_is_of_what_is_reserved() -> None:
    training = cost_of(config(), "train", 1800.0)
    assert (training.cpu_hours, training.gpu_hours) == (4.0, 0.0)
    gpus = config("compute.use_gpu=true")
    for step, hours in (("evaluate", (8.0, 2.0)), ("register", (4.0, 0.0))):
        cost = cost_of(gpus, step, 3600.0)
        assert (cost.cpu_hours, cost.gpu_hours) == hours
