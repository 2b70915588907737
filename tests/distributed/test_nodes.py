"""Clusters of nodes that share no disk but the store: the same weights and images as on one machine.

One that somebody else started may still grow: nodes are waited for, and their absence is no user's mistake.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray_nodes import RayNodes
from workers import assert_close_tensors, train_locally

from ncsn.config import from_yaml
from ncsn.data.samples import SampleSet
from ncsn.model.checkpoint import load_checkpoint
from ncsn.model.generate import generate
from ncsn.training.loop import TrainingJob

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


DRIVER = """
import sys
from ncsn.config import from_yaml
from ncsn.distributed import cluster as local_cluster
local_cluster.JOIN_SECONDS = float(sys.argv[2])
with local_cluster.ray_cluster(from_yaml(sys.argv[1])) as address:
    print("joined", flush=True)
    try:
        local_cluster.require_resources(from_yaml(sys.argv[1]))
    except RuntimeError as error:
        print("too few:", error)
    else:
        print("enough")
"""


def drive(cluster: RayNodes, config: str, *, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, config, str(seconds)]
    return subprocess.Popen(command, env=cluster.client, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_worker_that_joins_late_is_waited_for(tiny: str, tmp_path: Path) -> None:
    """As on Kubernetes after the loss of the head: the driver runs before the worker is back."""
    config = tiny.replace("num_workers: 1", "num_workers: 2")
    assert "num_workers: 2" in config
    with RayNodes(tmp_path, count=1, cpus=1) as cluster:
        told, _ = drive(cluster, config, seconds=1).communicate(timeout=60)
        assert "too few: compute.num_workers = 2: " in told
        driver = drive(cluster, config, seconds=120)
        assert driver.stdout is not None
        assert driver.stdout.readline() == "joined\n"
        cluster.add()
        told, said = driver.communicate(timeout=120)
        assert told == "enough\n", said


FAILING = """
import os, signal, sys, time
from ncsn.config import from_yaml
from ncsn.distributed.cluster import ray_cluster
from ncsn.distributed.ray_calls import call_all

def work(item):
    print("at work on", item, flush=True)
    if item == 0:
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(10)

with ray_cluster(from_yaml(sys.argv[1]), last_lines=sys.argv[2]):
    list(call_all(work, range(3), cpus=1))
"""


def test_the_last_lines_of_a_job_reach_the_store(cluster: RayNodes, tiny: str, tmp_path: Path) -> None:
    """Of all its workers on all nodes, with the stack of the one that is gone; not those of other jobs."""
    file = tmp_path / "workers.txt"
    for attempt in range(2):
        done = cluster.run([sys.executable, "-c", FAILING, tiny, str(file)], seconds=300)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("RuntimeError: WorkerCrashedError: ") and str(file) in last, (attempt, done.stderr)
        text = file.read_text()
        assert {f"at work on {item}" for item in range(3)} <= set(text.splitlines())
        assert "Fatal Python error: Segmentation fault" in text and "WorkerCrashedError" in text
        # Nodes of one machine share a folder of logs, so each of them has all.
        calls = {log.partition("\n")[0] for log in text.split("--- ") if "at work on 0" in log}
        assert 1 <= len(calls) <= 4, "the first call and its three retries, without those of the other job"


def ncsn(cluster: RayNodes, step: str, config: Path, *options: str) -> dict[str, Any]:
    done = cluster.run([sys.executable, "-m", "ncsn", step, "--config", str(config), *options, "--json"], seconds=600)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """One CPU on each node, so that a second worker needs a second node."""
    with RayNodes(tmp_path_factory.mktemp("nodes"), count=3, cpus=1) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def config(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment with two workers, in a store that every node sees."""
    folder = tmp_path_factory.mktemp("shared")
    file = folder / "tiny.yaml"
    file.write_text(tiny.replace("num_workers: 1", "num_workers: 2") + f"storage: {{root: {folder / 'store'}}}\n")
    return file


@pytest.fixture(scope="module")
def trained(cluster: RayNodes, config: Path, dataset: str) -> dict[str, Any]:
    return ncsn(cluster, "train", config, "--dataset", dataset, "--run", "spread")


def test_two_workers_on_two_nodes_follow_one(cluster, trained, tiny, dataset, tmp_path) -> None:
    workers = [actor for actor in cluster.listed("actors") if actor["class_name"] == "RayTrainWorker"]
    assert len({worker["node_id"] for worker in workers}) == len(workers) == 2
    train_locally(TrainingJob(config=from_yaml(tiny), dataset=dataset), tmp_path)
    assert_close_tensors(tmp_path / "images-000000160", trained["checkpoint"])


def test_images_made_on_three_nodes_are_those_of_one(cluster: RayNodes, trained: dict[str, Any], config: Path) -> None:
    options = ("--run", "spread", "--checkpoint", trained["checkpoint"], "--set", "sampling.batch_size=1")
    made = ncsn(cluster, "sample", config, *options)
    tasks = [task for task in cluster.listed("tasks") if task["name"] == "_sample_shard"]
    assert len(tasks) == 10
    assert {task["node_id"] for task in tasks} == set(cluster.nodes)
    images = SampleSet(made["uri"], 10).read(0, 10)
    loaded = load_checkpoint(trained["checkpoint"])
    alone = generate(loaded, sampling=loaded.config.sampling, first=0, count=10, device="cpu")
    np.testing.assert_array_equal(images, alone)
