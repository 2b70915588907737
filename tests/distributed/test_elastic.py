"""A real cluster that loses a node, and gets one: training goes on with what there is, on the same curve."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workers import assert_close_tensors, train_locally

from ncsn.config import from_yaml
from ncsn.runs.history import TrainingHistory, load_history
from ncsn.training.loop import TrainingJob

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

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
    return result


@pytest.fixture(scope="module")
def undisturbed(tiny: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one worker that nothing happens to."""
    run = tmp_path_factory.mktemp("undisturbed")
    job = TrainingJob(config=from_yaml(tiny, overrides=ELASTIC), dataset=dataset, history=str(run / "history.json"))
    train_locally(job, run / "checkpoints")
    return run


def history(run: Path) -> TrainingHistory:
    return load_history(str(run / "history.json"))


def assert_same_training(run: Path, whole: Path) -> None:
    seen, expected = history(run).images_seen, history(whole).images_seen
    saved = set(seen) - set(expected)  # in between, which divides what the next point is the mean of
    same = [place for before, place in pairwise([0, *expected]) if not saved & set(range(before, place))]
    assert set(expected) <= set(seen) and len(same) >= len(expected) - len(saved)
    for name in ("train/loss", "train/grad_norm_max"):
        found, wanted = (
            dict(zip(history(at).images_seen, history(at).curve(name), strict=True)) for at in (run, whole)
        )
        np.testing.assert_allclose(*([each[place] for place in same] for each in (found, wanted)), rtol=1e-4)
    assert_close_tensors(*(at / "checkpoints" / "images-000000640" for at in (run, whole)), rtol=1e-3)


def test_a_new_node_makes_training_grow_again(tiny: str, dataset: str, tmp_path: Path, undisturbed: Path) -> None:
    result = train_and_lose_a_node(tiny, dataset, tmp_path / "run", "replace", at_images=224)
    assert result["outcome"]["images_seen"] == 640
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
    assert result["outcome"]["images_seen"] == 640
    (kept,) = result["kept"]
    saved_at = int(kept.removeprefix("resume-"))
    assert 64 <= saved_at <= 64 + 15 / 0.6 * 16, "while the node was there"
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {path.name for path in (undisturbed / "checkpoints").iterdir()}
    assert_same_training(tmp_path / "run", undisturbed)
