"""`ncsn submit --wait` for real: KFP's client, a server of its API, and the pipeline on Ray, MLflow and digits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp_api import KfpServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KfpServer]:
    with KfpServer(tmp_path_factory.mktemp("kfp")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("NCSN_IMAGE", "ncsn-python:0.1.0")
        yield server


def submit(server: KfpServer, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ncsn", "submit", "--host", server.url, "--wait", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def outputs(server: KfpServer, name: str) -> list[str]:
    return [path.read_text() for path in server.root.rglob(f"*/{name}")]


@pytest.mark.timeout(1200)
def test_a_model_is_trained_registered_sampled_and_measured(workplace: Any, server: KfpServer) -> None:
    done = submit(server, "--config", str(workplace.config), "--run", "submitted")
    assert done.returncode == 0, done.stderr + "".join(outputs(server, "log.txt"))
    assert done.stdout.startswith(f"{server.url}/#/runs/details/")
    assert done.stderr.splitlines()[-1] == "submitted: SUCCEEDED"
    assert workplace.result("submitted", "register")["promoted"]
    status = json.loads(Path(workplace.folder("submitted"), "status.json").read_text())
    assert status["status"] == "FINISHED"
    (page,) = outputs(server, "finish/page")
    (run_id,) = server.runs
    assert f"| KFP run | `{run_id}` |" in page
    assert "| image | `ncsn-python:" in page

    settings = (f"storage.root={workplace.root}", "sampling.num_images=8", "evaluation.num_splits=2")
    options = [part for setting in settings for part in ("--set", setting)]
    params = ("--param", "model=models:/ncsn-tiny@champion", "--param", "evaluated=true")
    done = submit(server, "--pipeline", "sample", *options, *params)
    assert done.returncode == 0, done.stderr + "".join(outputs(server, "log.txt"))
    (images,) = (workplace.root / "generated" / "ncsn-tiny" / "1").iterdir()
    assert list(images.glob("shard-*.parquet"))
    figures = workplace.result(f"ncsn-tiny-1-{images.name}", "evaluate")
    assert "eval/classifier_fid_n8" in figures["metrics"]
