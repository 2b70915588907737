"""The tracking server is killed for a minute in the middle of a run: the run notices nothing, and nothing is lost."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow_server import Server, tracking_server

from ncsn.runs.steps import STEPS

RUN = "outage"
AWAY_SECONDS = 60
IMAGES, EVERY = 19200, 320


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with tracking_server(tmp_path) as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_minute_without_the_tracking_server_loses_nothing(
    workplace, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
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
