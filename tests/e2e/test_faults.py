"""Training and sampling under real failures, each against the run that nothing disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow_server import tracking_server
from ray_nodes import RayNodes
from same_run import assert_same_training, assert_told_once, checkpoints

from ncsn import storage
from ncsn.tracking.client import client_at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_IMAGES = 1920
OUTAGE_SECONDS = 30
SETTINGS = (f"train.num_images={NUM_IMAGES}", "train.checkpoint_every_images=160", "train.report_every_images=32")
SETTINGS += ("train.keep_checkpoints=100", "sampling.num_images=256")


def command(step: str, run: str, *more: str, root: str | None = None) -> tuple[str, ...]:
    settings = (*SETTINGS, *((f"storage.root={root}",) if root else ()))
    return (step, "--run", run, *(part for setting in settings for part in ("--set", setting)), *more)


def reached(workplace, process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Wait until the command has come that far, still at work."""
    workplace.wait_until(lambda: condition() or process.poll() is not None, what="it has come that far", seconds=900)
    assert process.poll() is None, process.communicate()[1][-3000:]


def finished(process: subprocess.Popen[str]) -> str:
    """What a command that has to succeed prints."""
    stdout, stderr = process.communicate(timeout=1500)
    assert process.returncode == 0, stderr[-3000:]
    return stdout + stderr


@pytest.fixture(scope="module")
def whole(workplace) -> str:
    """URI of a run that nothing disturbs, trained and sampled."""
    for step in ("ingest", "train", "sample"):
        finished(workplace.start(*command(step, "whole")))
    uri = str(workplace.folder("whole"))
    assert len(checkpoints(uri)) == NUM_IMAGES // 160
    assert_told_once(client_at(f"sqlite:///{workplace.root}/mlflow.db"), "whole", uri)
    return uri


@pytest.fixture(scope="module")
def dataset(workplace, whole: str) -> tuple[str, str]:
    """The option that names the dataset."""
    return "--dataset", workplace.result("whole", "ingest")["uri"]


def test_workers_killed_at_three_random_points(workplace, whole: str, dataset) -> None:
    faults = [f"kill-worker@images={image}" for image in sorted(random.sample(range(NUM_IMAGES), 3))]
    told = finished(workplace.start(*command("train", "workers", *dataset), *(f"--inject={fault}" for fault in faults)))
    uri = str(workplace.folder("workers"))
    assert told.count("kill-worker at image") == 3, faults
    assert told.count("worker lost") == 3
    assert "WorkerGroupError" not in told
    assert_same_training(whole, uri)
    assert_told_once(client_at(f"sqlite:///{workplace.root}/mlflow.db"), "workers", uri)


def test_a_killed_driver_and_the_same_command_again(workplace, whole: str, dataset) -> None:
    again = command("train", "driver", *dataset)
    uri = str(workplace.folder("driver"))
    process = workplace.start(*again, start_new_session=True)
    reached(workplace, process, lambda: checkpoints(uri))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    workplace.wait_for_silence()
    assert len(checkpoints(uri)) < NUM_IMAGES // 160, "it was killed too late to matter"
    finished(workplace.start(*again))
    assert_same_training(whole, uri)
    assert_told_once(client_at(f"sqlite:///{workplace.root}/mlflow.db"), "driver", uri)


@pytest.mark.parametrize("fault", ["kill-node@images=900", "preempt@images=200"])
def test_a_lost_node(workplace, whole: str, dataset, tmp_path: Path, fault: str) -> None:
    """The head only schedules; of two nodes for work the one that trains is lost, and the other takes over."""
    run = fault.partition("@")[0]
    uri = str(workplace.folder(run))
    train = (*command("train", run, *dataset), "--config", str(workplace.config), f"--inject={fault}")
    with RayNodes(tmp_path, count=1, cpus=0) as nodes:
        nodes.cpus = 2
        for _ in range(2):
            nodes.add()
        done = nodes.run([sys.executable, "-m", "ncsn", *train], seconds=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{run} at image" in done.stdout + done.stderr
    assert_same_training(whole, uri, in_time=1 if run == "preempt" else 0)
    assert_told_once(client_at(f"sqlite:///{workplace.root}/mlflow.db"), run, uri)


@contextmanager
def away(server) -> Iterator[None]:
    """The S3 server is gone for a while; in the end it is there again."""
    server.stop()
    try:
        time.sleep(OUTAGE_SECONDS)
        yield
    finally:
        server.start_again()


@pytest.fixture
def bucket(s3_root: str, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store in S3, and a database for MLflow beside it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "cache"))
    return s3_root


def test_the_s3_server_is_away_while_checkpoints_are_due_and_while_sampling(
    workplace, whole: str, dataset, bucket: str, s3_server, tmp_path: Path
) -> None:
    uri = f"{bucket}/runs/away"
    process = workplace.start(*command("train", "away", *dataset, root=bucket))
    reached(workplace, process, lambda: checkpoints(uri))
    with away(s3_server):
        assert process.poll() is None, "training can neither end nor fail meanwhile"
    finished(process)
    assert_same_training(whole, uri)
    assert_told_once(client_at(f"sqlite:///{tmp_path}/mlflow.db"), "away", uri)

    process = workplace.start(*command("sample", "away", root=bucket))
    reached(workplace, process, lambda: samples(uri))
    with away(s3_server):
        assert process.poll() is None, "sampling can neither end nor fail meanwhile"
    finished(process)
    assert samples(uri, whole=True) == samples(whole, whole=True)


def test_injected_outages_of_store_and_tracking_server_and_a_cut_checkpoint(
    workplace, whole: str, dataset, bucket: str, tmp_path: Path
) -> None:
    uri = f"{bucket}/runs/injected"
    faults = ("store-down@images=300:5s", "store-errors@images=900:0.3", "tracking-down@images=100:10s")
    faults += ("cut-checkpoint@images=1500",)
    train = command("train", "injected", *dataset, root=bucket)
    told = finished(workplace.start(*train, *(f"--inject={fault}" for fault in faults)))
    assert all(f"{fault.partition('@')[0]} at image" in told for fault in faults)
    assert "120 s" in told
    assert "weights.safetensors" in told
    assert_same_training(whole, uri)
    sample = command("sample", "injected", "--inject=store-down@images=0:5s", root=bucket)
    assert "answers again" in finished(workplace.start(*sample))
    assert samples(uri, whole=True) == samples(whole, whole=True)
    assert_told_once(client_at(f"sqlite:///{tmp_path}/mlflow.db"), "injected", uri)


def samples(run: str, *, whole: bool = False) -> dict[str, bytes]:
    """The shards of a run, by their names below its samples; without `whole` none is read."""
    found = {}
    folder = storage.join(run, "samples")
    for checkpoint in storage.list_names(folder):
        for sampler in storage.list_names(storage.join(folder, checkpoint)):
            for name in storage.list_names(storage.join(folder, checkpoint, sampler)):
                if name.endswith(".parquet"):
                    path = f"{checkpoint}/{sampler}/{name}"
                    found[path] = storage.read_bytes(storage.join(folder, path)) if whole else b""
    return found


def test_mlflow_is_away_for_a_minute(workplace, whole: str, dataset, tmp_path: Path, monkeypatch) -> None:
    uri = str(workplace.folder("unheard"))
    with tracking_server(tmp_path) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        process = workplace.start(*command("train", "unheard", *dataset))
        reached(workplace, process, lambda: checkpoints(uri))
        with server.away():
            assert process.poll() is None
            time.sleep(60)
        finished(process)
        finished(workplace.start(*command("sample", "unheard")))  # which sends what training could not
    assert_same_training(whole, uri)
    assert_told_once(client_at(f"sqlite:///{tmp_path}/server.db"), "unheard", uri)
