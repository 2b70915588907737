"""Clusters of nodes that share no disk but the store: the same weights and images as on one machine.

One that somebody else started may still grow: nodes are waited for, and their absence is no user's mistake. One that
loses a node, and gets one, goes on with what there is, on the same curve.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby, pairwise
from operator import itemgetter
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
from ncsn.runs.history import load_history
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


def test_a_cluster_of_this_machine_has_no_dashboard_and_keeps_the_last_lines(tiny: str, tmp_path: Path) -> None:
    page = "    import ray; print(bool(ray.init(ignore_reinit_error=True).dashboard_url))\n"
    file, code = tmp_path / "workers.txt", FAILING.replace("    list(", f"{page}    list(")
    done = subprocess.run([sys.executable, "-c", code, tiny, str(file)], capture_output=True, text=True, timeout=300)
    assert "False" in done.stdout.splitlines()
    assert done.returncode == 1 and str(file) in done.stderr, done.stderr
    text = file.read_text()
    assert {f"at work on {item}" for item in range(2)} <= set(text.splitlines())
    assert "Fatal Python error: Segmentation fault" in text


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


SCRIPT = Path(__file__).parents[1] / "helpers" / "node_cluster.py"
QUICK = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",  # off in this process once a test has started a cluster of this machine
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_raylet_start_wait_time_s": "120",
}
ELASTIC = ["compute.num_workers=[1, 2]", "train.num_images=640", "train.checkpoint_every_images=160"]


def train_and_lose_a_node(tiny: str, dataset: str, run: Path, how: str, at_images: int) -> dict[str, Any]:
    run.mkdir()
    config = run / "config.yaml"
    config.write_text(json.dumps(from_yaml(tiny, overrides=ELASTIC).model_dump(mode="json")))
    environment = os.environ | QUICK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), str(config), dataset, str(run), how, str(at_images)]
    with (run / "log").open("w") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=900)
    assert done.returncode == 0, (run / "log").read_text()[-5000:]
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    assert result["outcome"]["images_seen"] == 640
    return result


@pytest.fixture(scope="module")
def undisturbed(tiny: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one worker that nothing happens to."""
    run = tmp_path_factory.mktemp("undisturbed")
    job = TrainingJob(config=from_yaml(tiny, overrides=ELASTIC), dataset=dataset, history=str(run / "history.json"))
    train_locally(job, run / "checkpoints")
    return run


def assert_same_training(run: Path, whole: Path) -> None:
    one, other = (load_history(str(each / "history.json")) for each in (run, whole))
    seen, expected = one.images_seen, other.images_seen
    saved = set(seen) - set(expected)  # in between, which divides what the next point is the mean of
    same = [place for before, place in pairwise([0, *expected]) if not saved & set(range(before, place))]
    assert set(expected) <= set(seen) and len(same) >= len(expected) - len(saved)
    for name in ("train/loss", "train/grad_norm_max"):
        found, wanted = (dict(zip(each.images_seen, each.curve(name), strict=True)) for each in (one, other))
        np.testing.assert_allclose(*([each[place] for place in same] for each in (found, wanted)), rtol=1e-4)
    assert_close_tensors(*(at / "checkpoints" / "images-000000640" for at in (run, whole)), rtol=1e-3)


def test_a_new_node_makes_training_grow_again(tiny: str, dataset: str, tmp_path: Path, undisturbed: Path) -> None:
    result = train_and_lose_a_node(tiny, dataset, tmp_path / "run", "replace", at_images=224)
    attempts = [(count, [done for done, _ in seen]) for count, seen in groupby(result["seen"], key=itemgetter(1))]
    assert [count for count, _ in attempts] == [2, 1, 2]
    for (_, before), (_, after) in pairwise(attempts):
        newest = max(before) // 160 * 160
        assert after[0] - 16 in (newest, newest - 160), "it went on from the newest checkpoint that was stored"
        assert after == list(range(after[0], after[-1] + 1, 16))
    assert_same_training(tmp_path / "run", undisturbed)


def test_a_notice_makes_a_checkpoint_in_time(tiny: str, dataset: str, tmp_path: Path, undisturbed: Path) -> None:
    """The node has 15 seconds left when Ray is told to drain it."""
    result = train_and_lose_a_node(tiny, dataset, tmp_path / "run", "drain", at_images=64)
    (kept,) = result["kept"]
    assert 64 <= int(kept.removeprefix("resume-")) <= 64 + 15 / 0.6 * 16, "while the node was there"
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {path.name for path in (undisturbed / "checkpoints").iterdir()}
    assert_same_training(tmp_path / "run", undisturbed)
