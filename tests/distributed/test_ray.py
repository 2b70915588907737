"""Training and sampling on a real Ray cluster: the worker count changes nothing, mistakes are not retried."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from on_ray import KillsWorker, RayDriver, ends_by_a_mistake, evaluate_by_tasks, live_scores, ray_driver, with_progress
from refused import refused
from workers import assert_close_tensors, assert_same_tensors, train_locally

from ncsn import distributed
from ncsn.config import Config, from_yaml
from ncsn.data.format import Rows, from_table, to_table
from ncsn.distributed.cluster import require_resources
from ncsn.distributed.sampling import make_shards, plan_shards
from ncsn.errors import UserError
from ncsn.model.checkpoint import CheckpointError
from ncsn.progress import Progress
from ncsn.steps.evaluate import evaluate
from ncsn.training.loop import TrainingJob

LAST = "images-000000160"


@pytest.fixture(scope="module")
def driver(tiny: str) -> Iterator[RayDriver]:
    """The driver of a cluster, in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "helpers"), prepend=os.pathsep)
        patch.setenv("NCSN_DASHBOARD", "1")
        with ray_driver(two_workers(tiny)) as (driver, _):
            yield driver


@pytest.fixture(scope="module")
def trained(driver: RayDriver, tiny: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run trained by two workers."""
    run = tmp_path_factory.mktemp("run")
    outcome = driver(distributed.train, TrainingJob(config=two_workers(tiny), dataset=dataset), run_uri=str(run))
    assert outcome.images_seen == 160
    return run / "checkpoints"


def two_workers(tiny: str, *overrides: str) -> Config:
    return from_yaml(tiny, overrides=["compute.num_workers=2", *overrides])


@pytest.mark.usefixtures("driver")
def test_everything_listens_on_loopback() -> None:
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    connections = [each for each in psutil.net_connections("inet") if each.pid in ours and each.status == "LISTEN"]
    listening = {part for each in connections for part in psutil.Process(each.pid).cmdline()}
    assert len(connections) > 3 and any(part.endswith("dashboard.py") for part in listening)
    assert {each.laddr.ip for each in connections} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.usefixtures("trained")
def test_workers_are_as_nice_as_the_command() -> None:
    here = psutil.Process()
    workers = [process for process in here.children(recursive=True) if process.name().startswith("ray::")]
    assert workers and {process.nice() for process in workers} == {here.nice()}


def test_two_workers_follow_one(trained: Path, tiny: str, dataset: str, tmp_path: Path) -> None:
    """The same images, levels and noise whatever the worker count: equal weights to rounding."""
    train_locally(TrainingJob(config=from_yaml(tiny), dataset=dataset), tmp_path)
    for step in ("images-000000080", LAST):
        assert_close_tensors(tmp_path / step, trained / step)


def test_a_mistake_of_one_worker_is_said_and_the_others_end(driver: RayDriver) -> None:
    mistake, errors, seconds = driver(ends_by_a_mistake)
    assert isinstance(mistake, UserError)
    assert errors == {} and seconds < 60


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_and_a_damaged_checkpoint_change_nothing(
    driver: RayDriver, trained: Path, tiny: str, dataset: str, tmp_path: Path, workers: int, hangs: bool
) -> None:
    """Bit for bit the weights, EMA and optimizer of the run that nothing disturbed."""
    run = tmp_path / "run"
    kill = KillsWorker(112, tmp_path / "killed", cut=run / "checkpoints" / "images-000000096", hangs=hangs)
    config = from_yaml(tiny, overrides=[f"compute.num_workers={workers}", "train.checkpoint_every_images=48"])
    job = TrainingJob(config=config, dataset=dataset, progress=kill)
    outcome = driver(distributed.train, job, run_uri=str(run))
    (note,) = outcome.notes
    assert all(name in note for name in ("images-000000096", "weights.safetensors", "images-000000048"))
    assert kill.killed.exists()
    stacks = {path.name: "on_ray.py" in path.read_text() for path in run.glob("hung/*")}
    assert stacks == ({f"worker-{rank}.txt": rank == 0 for rank in range(workers)} if hangs else {})
    if workers == 1:
        train_locally(TrainingJob(config=config, dataset=dataset), tmp_path / "whole")
    assert_same_tensors((trained if workers == 2 else tmp_path / "whole") / LAST, run / "checkpoints" / LAST)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"images-{seen:09d}" for seen in (48, 96, 144, 160)]


def test_a_mistake_is_not_retried(driver: RayDriver, trained: Path, tiny: str, dataset: str) -> None:
    """A checkpoint of another config would fail at every retry."""
    other = two_workers(tiny, "noise.sigma_1=2.0")
    with pytest.raises(CheckpointError, match=r"noise\.sigma_1"):
        driver(distributed.train, TrainingJob(config=other, dataset=dataset), run_uri=str(trained.parent))


def test_more_workers_than_the_cluster_has_are_refused(driver: RayDriver, tiny: str) -> None:
    with refused("compute.num_workers"):
        driver(require_resources, from_yaml(tiny, overrides=["compute.num_workers=8", "train.batch_size=16"]))


Sample = Callable[..., np.ndarray]


@pytest.fixture
def sample(driver: RayDriver, trained: Path) -> Sample:
    """Makes a folder of ten images, and returns them."""

    def sample_ten(folder: Path, config: Config, *, batch: int) -> np.ndarray:
        ten = config.sampling.model_copy(update={"batch_size": batch, "num_images": 10})
        config = config.model_copy(update={"sampling": ten})
        planned = plan_shards(config, checkpoint=str(trained / LAST), folder=str(folder))
        made, told = driver(with_progress, make_shards, config, planned)
        assert made == 10 and told[-1] == (10, 10)
        return images_in(folder)

    return sample_ten


def images_in(folder: Path) -> np.ndarray:
    tables = [pq.read_table(path) for path in sorted(folder.glob("shard-*.parquet"))]
    return np.concatenate([from_table(table).images for table in tables])


@pytest.mark.oracle(22)
def test_images_do_not_depend_on_how_they_are_sharded_nor_on_a_cluster(sample, trained, tiny, tmp_path) -> None:
    config = from_yaml(tiny)
    whole = sample(tmp_path / "whole", config, batch=10)
    assert whole.shape == (10, 8, 8, 1) and whole.dtype == np.uint8
    assert np.array_equal(whole, sample(tmp_path / "parts", config, batch=3))
    assert not np.array_equal(
        whole, sample(tmp_path / "other", from_yaml(tiny, overrides=["sampling.seed=1"]), batch=10)
    )
    planned = plan_shards(config, checkpoint=str(trained / LAST), folder=str(tmp_path / "here"))
    assert make_shards(config, planned, progress=Progress()) == 10
    assert np.array_equal(whole, images_in(tmp_path / "here"))


def test_the_score_is_known_while_images_are_made(driver, sample, trained, tiny, dataset, tmp_path) -> None:
    """With some shards there already, it is at every point that of an evaluation afterwards."""
    overrides = ["evaluation.classifier_epochs=1", "sampling.num_images=300", "sampling.batch_size=20"]
    config = from_yaml(tiny, overrides=overrides)
    sample(tmp_path, config, batch=4)
    scores, there = driver(live_scores, config, dataset, checkpoint=str(trained / LAST), folder=str(tmp_path))
    assert [score.num_images for score in scores] == [256, 300]
    assert there[0] < 300
    folder = tmp_path / "evaluation"
    after = evaluate(config, samples=str(tmp_path), dataset=dataset, folder=str(folder), progress=Progress())
    for score, point in zip(scores, after.running, strict=True):
        assert asdict(score) == pytest.approx(point, rel=1e-5)


def test_an_evaluation_by_tasks_has_the_figures_of_one_process(driver, tiny, dataset, tmp_path) -> None:
    """The reference too; and no piece of the features is left."""
    noise = np.random.default_rng(0).integers(0, 256, (2100, 8, 8, 1), dtype=np.uint8)
    samples, copy, folder = tmp_path / "samples", tmp_path / "copy", tmp_path / "shared"
    samples.mkdir()
    for first in range(0, 2100, 700):
        rows = Rows(noise[first : first + 700], np.full(700, -1))
        pq.write_table(to_table(rows), samples / f"shard-{first:09d}-{first + 700:09d}.parquet")
    overrides = ["sampling.num_images=2100", "evaluation={classifier_epochs: 1, num_splits: 2, batch_size: 64}"]
    given: dict[str, Any] = {"config": from_yaml(tiny, overrides=overrides), "samples": str(samples)}
    alone = evaluate(**given, dataset=dataset, folder=str(tmp_path / "alone"), progress=Progress())
    shutil.copytree(dataset, copy, ignore=shutil.ignore_patterns("reference"))
    shared, told = driver(with_progress, evaluate_by_tasks, **given, dataset=str(copy), folder=str(folder))
    assert shared.metrics == pytest.approx(alone.metrics, rel=1e-5)
    assert shared.real_metrics == pytest.approx(alone.real_metrics, rel=1e-5)
    assert shared.fingerprint == alone.fingerprint and len(shared.running) == len(alone.running)
    total = told[0][1]
    counts = [done for done, of in told if of == total]  # the comparisons of the audit are counted for themselves
    assert counts == sorted(counts) and len(counts) > 5 and counts[-1] == total > 0
    assert not list(copy.glob("reference/.*")) and not list(folder.glob(".*"))


def test_a_sampler_that_diverges_is_a_mistake(sample, tiny, tmp_path) -> None:
    config = from_yaml(tiny, overrides=["sampling.sampler.epsilon=1.0", "sampling.sampler.steps_per_level=200"])
    with refused("sampling.sampler"):
        sample(tmp_path, config, batch=10)
