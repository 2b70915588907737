"""The route of a new step: one module and one line, and it has all that the others have."""

from __future__ import annotations

import json
from pathlib import Path

import describe
import numpy as np
import pytest
from click.testing import CliRunner
from do import do, do_as_task
from experiments import SHORT, tiny
from kfp import dsl

from components import publish, publish_metrics, run_task
from ncsn.cli import app
from ncsn.config import to_json, to_yaml
from ncsn.data.samples import SampleSet
from ncsn.inspection.listing import describe_run, find_items
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import read_attempt, read_result
from ncsn.runs.steps import STEP_TABLE
from ncsn.tracking.client import connect, tracking_uri


def component(
    config: str,
    run: str,
    samples: dsl.Input[dsl.Dataset],
    described: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Describe the samples."""
    result = run_task("describe", config, run, samples=samples)
    publish(described, result, display_name=str(result), uri=result.uri)
    publish_metrics(metrics, {"describe/mean": result.mean, "describe/deviation": result.deviation})


def test_a_step_of_one_module_and_one_line_has_command_record_mlflow_lease_show_and_report(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setitem(STEP_TABLE, "describe", describe.STEP)
    config = tiny(tmp_path, *SHORT, "data.max_images=20")
    for step in ("ingest", "train", "sample", "evaluate"):
        do(step, config, "mine")
    (tmp_path / "mine.yaml").write_text(to_yaml(config))
    folder = RunFolder(str(tmp_path), "mine")

    def ncsn(*words: str) -> str:
        capfd.readouterr()
        app.main([*words, "--config", str(tmp_path / "mine.yaml"), "--run", "mine"], standalone_mode=False)
        return capfd.readouterr().out

    assert "describe" in CliRunner().invoke(app, ["--help"]).output
    printed = json.loads(ncsn("describe", "--json"))
    sampled = read_result(folder, STEP_TABLE["sample"].result)
    pixels = np.asarray(SampleSet(sampled.uri, sampled.num_images).read(0, sampled.num_images), float)
    assert (printed["count"], printed["mean"]) == (sampled.num_images, pytest.approx(pixels.mean()))
    result = read_result(folder, describe.DescribeResult)
    assert result.plain() == printed
    written = Path(result.uri).stat().st_mtime_ns
    assert ncsn("describe").splitlines()[0] == f"describe: {result}"
    assert Path(result.uri).stat().st_mtime_ns == written, "it is done once"

    attempt = read_attempt(folder, "describe")
    assert (attempt.state, attempt.reads) == ("FINISHED", {"samples": sampled.uri})
    tracked = connect(config).client.get_run(attempt.mlflow["run_id"])
    assert (tracked.info.status, tracked.data.metrics["describe/mean"]) == ("FINISHED", result.mean)
    assert tracked.data.tags["ncsn.step"] == "describe" and float(tracked.data.tags["cost.seconds"]) >= 0

    (shown,) = find_items(str(tmp_path), tracking_uri(config), "mine")
    assert shown.facts["describe"].startswith(str(result))
    assert describe_run(str(tmp_path), "mine").state == "FINISHED describe"
    do("report", config, "mine")
    assert str(result) in Path(folder.report, "report.html").read_text()

    Path(result.uri).unlink()  # made again, by the driver of a job under its launcher's lease
    lease = tmp_path / "lease" / "5f3a"
    lease.mkdir(parents=True)
    (lease / "launcher").touch()
    assert do("describe", config, "mine", lease=str(lease)) == result
    assert read_attempt(folder, "describe").request == "5f3a"
    assert do_as_task("describe", config, "mine") == result


def test_its_component_has_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEP_TABLE, "describe", describe.STEP)
    config = tiny(tmp_path / "store", *SHORT, "data.max_images=20")
    for step in ("ingest", "train"):
        do(step, config, "mine")
    sampled = do("sample", config, "mine")
    kinds = {"described": dsl.Artifact, "metrics": dsl.Metrics}
    outputs = {name: kind(uri=str(tmp_path / name)) for name, kind in kinds.items()}
    component(to_json(config), "mine", samples=dsl.Dataset(metadata={"uri": sampled.uri}), **outputs)
    assert outputs["described"].metadata["uri"] == f"{tmp_path}/store/runs/mine/describe.json"
    assert outputs["metrics"].metadata.keys() == {"describe/mean", "describe/deviation"}
