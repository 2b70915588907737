"""Training and sampling on a real Ray cluster: the worker count changes nothing, mistakes are not retried."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from on_ray import (
    KillsWorker,
    RayDriver,
    ends_by_a_mistake,
    evaluate_by_tasks,
    live_scores,
    ray_driver,
    with_environment,
    with_progress,
)
from refused import refused
from workers import assert_close_tensors, assert_same_tensors, train_locally

from ncsn import distributed
from ncsn.config import Config, from_yaml
from ncsn.data.format import Rows, from_table, to_table
from ncsn.distributed.cluster import cluster_for, ray_tags, require_resources
from ncsn.distributed.sampling import LEVELS, make_shards, plan_shards
from ncsn.errors import UserError
from ncsn.model.checkpoint import CheckpointError
from ncsn.progress import Progress
from ncsn.steps.evaluate import evaluate
from ncsn.training.loop import TrainingJob

HELPERS = Path(__file__).parents[1] / "helpers"


class Cluster(NamedTuple):
    """A driver in a separate process and the address of its cluster."""

    driver: RayDriver
    address: str


@pytest.fixture(scope="module")
def cluster(tiny: str) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("PYTHONPATH", str(HELPERS), prepend=os.pathsep)
        config = from_yaml(tiny, overrides=["compute.num_workers=2"])
        with ray_driver(config, dashboard=True) as (driver, joining):
            yield Cluster(driver, joining["RAY_ADDRESS"])


@pytest.fixture(scope="module")
def trained(cluster: Cluster, tiny: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained by two workers."""
    run = tmp_path_factory.mktemp("run")
    job = TrainingJob(config=two_workers(tiny), dataset=dataset)
    outcome = cluster.driver(distributed.train, job, run_uri=str(run))
    assert outcome.images_seen == 160
    return run


def two_workers(tiny: str, *overrides: str) -> Config:
    return from_yaml(tiny, overrides=["compute.num_workers=2", *overrides])


def test_everything_listens_on_loopback(cluster: Cluster) -> None:
    """No Ray process accepts a connection from another machine."""
    ours = {process.pid for process in psutil.Process().children(recursive=True)} | {psutil.Process().pid}
    listening = [
        connection.laddr
        for connection in psutil.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN and connection.pid in ours
    ]
    assert len(listening) > 3
    assert {address.ip for address in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    host, port = cluster.address.split(":")
    assert host == "127.0.0.1"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        assert connection.getpeername()[1] == int(port)


@pytest.mark.usefixtures("trained")
def test_workers_are_as_nice_as_the_command() -> None:
    here = psutil.Process()
    workers = [process for process in here.children(recursive=True) if process.name().startswith("ray::")]
    assert workers and {process.nice() for process in workers} == {here.nice()}


def test_two_workers_follow_one(trained: Path, tiny: str, dataset: str, tmp_path: Path) -> None:
    """The same images, levels and noise whatever the worker count: equal weights to rounding."""
    train_locally(TrainingJob(config=from_yaml(tiny), dataset=dataset), tmp_path)
    for step in ("images-000000080", "images-000000160"):
        assert_close_tensors(tmp_path / step, trained / "checkpoints" / step)


def test_a_mistake_of_one_worker_is_said_and_the_others_end(cluster: Cluster) -> None:
    mistake, errors, seconds = cluster.driver(ends_by_a_mistake)
    assert isinstance(mistake, UserError)
    assert errors == {} and seconds < 60


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_and_a_damaged_checkpoint_change_nothing(
    cluster: Cluster, trained: Path, tiny: str, dataset: str, tmp_path: Path, workers: int, hangs: bool
) -> None:
    """Bit for bit the weights, EMA and optimizer of the run that nothing disturbed."""
    last, run = "images-000000160", tmp_path / "run"
    kill = KillsWorker(112, tmp_path / "killed", cut=run / "checkpoints" / "images-000000096", hangs=hangs)
    config = from_yaml(tiny, overrides=[f"compute.num_workers={workers}", "train.checkpoint_every_images=48"])
    job = TrainingJob(config=config, dataset=dataset, progress=kill)
    outcome = cluster.driver(distributed.train, job, run_uri=str(run))
    (note,) = outcome.notes
    assert all(name in note for name in ("images-000000096", "weights.safetensors", "images-000000048"))
    assert kill.killed.exists()
    stacks = {path.name: "on_ray.py" in path.read_text() for path in run.glob("hung/*")}
    assert stacks == ({f"worker-{rank}.txt": rank == 0 for rank in range(workers)} if hangs else {})
    if workers == 1:
        train_locally(TrainingJob(config=config, dataset=dataset), tmp_path / "whole")
    whole = trained / "checkpoints" if workers == 2 else tmp_path / "whole"
    assert_same_tensors(whole / last, run / "checkpoints" / last)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"images-{seen:09d}" for seen in (48, 96, 144, 160)]


def test_a_mistake_is_not_retried(cluster: Cluster, trained: Path, tiny: str, dataset: str) -> None:
    """A checkpoint of another config would fail at every retry."""
    other = two_workers(tiny, "noise.sigma_1=2.0")
    with pytest.raises(CheckpointError, match=r"noise\.sigma_1"):
        cluster.driver(distributed.train, TrainingJob(config=other, dataset=dataset), run_uri=str(trained))


def test_more_workers_than_the_cluster_has_are_refused(cluster: Cluster, tiny: str) -> None:
    with refused("compute.num_workers"):
        cluster.driver(require_resources, from_yaml(tiny, overrides=["compute.num_workers=8", "train.batch_size=16"]))


Sample = Callable[..., tuple[int, np.ndarray]]


@pytest.fixture
def sample(cluster: Cluster, trained: Path) -> Sample:
    """Makes a folder of ten images: how many were made in the call, and all of them."""

    def sample_ten(folder: Path, config: Config, *, batch: int) -> tuple[int, np.ndarray]:
        ten = config.sampling.model_copy(update={"batch_size": batch, "num_images": 10})
        config = config.model_copy(update={"sampling": ten})
        planned = plan_shards(config, checkpoint=checkpoint_of(trained), folder=str(folder))
        made, told = cluster.driver(with_progress, make_shards, config, planned)
        assert not told or told[-1] == (10, 10)
        tables = [pq.read_table(path) for path in sorted(folder.glob("shard-*.parquet"))]
        return made, np.concatenate([from_table(table).images for table in tables])

    return sample_ten


def checkpoint_of(trained: Path) -> str:
    return str(trained / "checkpoints" / "images-000000160")


@pytest.mark.oracle(22)
def test_images_do_not_depend_on_how_they_are_sharded(sample: Sample, tiny: str, tmp_path: Path) -> None:
    config = from_yaml(tiny)
    made, whole = sample(tmp_path / "whole", config, batch=10)
    assert made == 10 and whole.shape == (10, 8, 8, 1) and whole.dtype == np.uint8
    _, parts = sample(tmp_path / "parts", config, batch=3)
    assert np.array_equal(whole, parts)
    _, other = sample(tmp_path / "other", from_yaml(tiny, overrides=["sampling.seed=1"]), batch=10)
    assert not np.array_equal(whole, other)


def test_the_score_is_known_while_images_are_made(cluster, sample, trained, tiny, dataset, tmp_path) -> None:
    """With some shards there already, it is at every point that of an evaluation afterwards."""
    overrides = ["evaluation.classifier_epochs=1", "sampling.num_images=300", "sampling.batch_size=20"]
    config = from_yaml(tiny, overrides=overrides)
    sample(tmp_path, config, batch=4)  # ten images
    scores, there = cluster.driver(
        live_scores, config, dataset, checkpoint=checkpoint_of(trained), folder=str(tmp_path)
    )
    assert [score.num_images for score in scores] == [256, 300]
    assert there[0] < 300
    folder = tmp_path / "evaluation"
    after = evaluate(config, samples=str(tmp_path), dataset=dataset, folder=str(folder), progress=Progress())
    for score, point in zip(scores, after.running, strict=True):
        assert asdict(score) == pytest.approx(point, rel=1e-5)


def test_an_evaluation_by_tasks_has_the_figures_of_one_process(cluster, tiny, dataset, tmp_path) -> None:
    """The reference too; and no piece of the features is left."""
    noise = np.random.default_rng(0).integers(0, 256, (2100, 8, 8, 1), dtype=np.uint8)
    samples = tmp_path / "samples"
    samples.mkdir()
    for first in range(0, 2100, 700):
        part = noise[first : first + 700]
        pq.write_table(to_table(Rows(part, np.full(700, -1))), samples / f"shard-{first:09d}-{first + 700:09d}.parquet")
    overrides = ["sampling.num_images=2100", "evaluation={classifier_epochs: 1, num_splits: 2, batch_size: 64}"]
    config = from_yaml(tiny, overrides=overrides)
    given: dict[str, Any] = {"samples": str(samples)}
    alone = evaluate(config, **given, dataset=dataset, folder=str(tmp_path / "alone"), progress=Progress())
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy, ignore=shutil.ignore_patterns("reference"))
    shared, told = cluster.driver(
        with_progress, evaluate_by_tasks, config, **given, dataset=str(copy), folder=str(tmp_path / "shared")
    )
    assert shared.metrics == pytest.approx(alone.metrics, rel=1e-5)
    assert shared.real_metrics == pytest.approx(alone.real_metrics, rel=1e-5)
    assert shared.fingerprint == alone.fingerprint
    assert len(alone.running) == len(shared.running)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]
    assert len([done for done, _ in told]) > 5, "piece by piece"
    assert not list(copy.glob("reference/.*")) and not list((tmp_path / "shared").glob(".*"))


def test_a_single_shard_is_the_same_without_a_cluster(sample, trained, tiny, tmp_path) -> None:
    config = from_yaml(tiny, overrides=["sampling.batch_size=10"])
    _, images = sample(tmp_path / "cluster", config, batch=10)
    plan = partial(plan_shards, checkpoint=checkpoint_of(trained), folder=str(tmp_path / "here"))
    (shard,) = plan(config)
    assert (shard.first, shard.count) == (0, 10)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    with cluster_for(config, start=False):
        assert ray_tags() == {}  # of no cluster
        assert make_shards(config, [shard], progress=Progress()) == 10
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before + 1
    assert plan(config) == []
    scored = plan(from_yaml(tiny, overrides=["sampling.batch_size=4"]), dataset="anywhere")
    assert [(shard.first, shard.count, shard.exists) for shard in scored] == [(0, 4, True), (4, 4, True), (8, 2, True)]
    (file,) = (tmp_path / "here").glob("shard-*.parquet")
    assert np.array_equal(from_table(pq.read_table(file)).images, images)
    assert np.array_equal(np.load(tmp_path / "here" / LEVELS)[-1], images[:8])


def test_a_sampler_that_diverges_is_a_mistake(sample: Sample, tiny: str, tmp_path: Path) -> None:
    config = from_yaml(tiny, overrides=["sampling.sampler.epsilon=1.0", "sampling.sampler.steps_per_level=200"])
    with refused("sampling.sampler"):
        sample(tmp_path, config, batch=10)


def test_a_submitted_job_is_tagged_with_the_names_of_the_jobs_api(cluster: Cluster) -> None:
    assert cluster.driver(ray_tags).keys() == {"ray.job_id", "ray.session"}  # not its page, which ends with the process
    metadata = {"job_submission_id": "raysubmit_1", "job_name": "ncsn-digits"}
    # As Ray's job supervisor sets it for the driver that it starts.
    variable = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {}, "metadata": metadata})}
    tags = cluster.driver(with_environment, variable, ray_tags)
    assert (tags["ray.submission_id"], tags["ray.job_name"]) == ("raysubmit_1", "ncsn-digits")
    assert tags["ray.job_id"]
