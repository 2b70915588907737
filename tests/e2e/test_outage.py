"""The tracking server is killed for a minute in the middle of a run: the run notices nothing, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from ports import free_port

from ncsn.runs.folder import STEPS
from ncsn.tracking.client import client_at

RUN = "outage"
AWAY_SECONDS = 60
IMAGES, EVERY = 19200, 320


class TrackingServer:
    """A real MLflow server on loopback that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        database = f"sqlite:///{folder}/server.db"
        client_at(database)  # the server takes long to create it
        places = ("--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts"))
        address = ("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        self._command = [sys.executable, "-m", "mlflow", "server", *places, *address]
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_minute_without_the_tracking_server_loses_nothing(
    workplace, server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    workplace.wait_until(server.answers, what="the tracking server answers")
    settings = (f"train.num_images={IMAGES}", f"train.checkpoint_every_images={IMAGES // 2}")
    settings += (f"train.report_every_images={EVERY}",)
    process = workplace.start("run", "--run", RUN, "--json", *(part for one in settings for part in ("--set", one)))
    client = MlflowClient(server.url, server.url)

    def curve() -> list[int]:
        """Images seen of each point that has reached the server."""
        found = client.search_runs([client.get_experiment_by_name("ncsn").experiment_id], "tags.`ncsn.step` = 'train'")
        return [point.step for run in found for point in client.get_metric_history(run.info.run_id, "train/loss")]

    trained = workplace.folder(RUN) / "steps" / "train" / "progress.json"
    workplace.wait_until(lambda: trained.exists() or process.poll() is not None, what="training begins")
    assert process.poll() is None, process.communicate()[1]
    workplace.wait_until(curve, what="the first point of the curve arrives")
    before = len(curve())
    server.kill()
    assert before < IMAGES // EVERY, "the outage begins in the middle of the training"
    time.sleep(AWAY_SECONDS)
    server.start()
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert list(json.loads(stdout)["steps"]) == list(STEPS)

    assert curve() == list(range(EVERY, IMAGES + 1, EVERY)), "each point once and in order"
    experiment = client.get_experiment_by_name("ncsn").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {RUN, *STEPS}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {f"cost/{step}_seconds" for step in STEPS} <= runs[RUN].data.metrics.keys()
    assert "report.html" in [file.path for file in client.list_artifacts(runs[RUN].info.run_id)]
    assert not list((workplace.folder(RUN) / "tracking").glob("*.jsonl")), "nothing is left to send"
