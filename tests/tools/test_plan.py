"""A plan from a real rehearsal, and the account of what was taken beside it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from ncsn.config import Config, from_yaml
from ncsn.data.parquet import write_dataset
from ncsn.data.sources import open_source
from ncsn.runs import costs
from ncsn.runs.costs import load_prices
from ncsn.runs.folder import run_folder
from ncsn.steps.step import Step
from ncsn.steps.train import TrainResult
from ncsn.tools import trial_run
from ncsn.tools.planning import STEPS
from ncsn.tools.trial_run import count

TINY = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3}
noise: {num_levels: 4}
network: {kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 16, num_images: 160000, checkpoint_every_images: 80000, report_every_images: 800}
sampling: {num_images: 90, batch_size: 20, sampler: {kind: annealed_langevin, steps_per_level: 2}}
evaluation: {classifier_epochs: 3}
"""


def config(root: Path, *overrides: str) -> Config:
    return from_yaml(TINY, overrides=[f"storage.root={root}", *overrides])


@pytest.mark.slow
def test_rehearsal_knows_what_each_step_takes_and_leaves_only_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    parts: list[str] = []
    made = trial_run.run(config(tmp_path), run="planned", report=parts.append)
    assert parts == ["start", *STEPS]
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [
        "runs/planned/plan.json"
    ]
    assert json.loads((tmp_path / "runs" / "planned" / "plan.json").read_text()) == made
    assert made["counts"] == {"train_images": 1258, "test_images": 539, "shards": 5, "nfe": 9}
    rates = made["rates"]
    assert all(rates["fixed"][step] > 0 for step in STEPS)
    measured = ("train_image", "sample_evaluation", "classifier_image", "extract_image")
    measured += ("neighbour_image", "checkpoint_bytes")
    assert all(rates[name] > 0 for name in measured)
    assert 1e-5 < rates["train_image"] < 1.0
    assert 5e7 < rates["worker_bytes"] < rates["machine_bytes"]
    training = made["steps"]["train"]["seconds"]
    assert training == pytest.approx(rates["fixed"]["train"] + 160000 * rates["train_image"] + 2 * rates["checkpoint"])
    assert made["memory"]["fits"]


def test_a_rehearsed_training_is_split_into_images_checkpoint_and_the_rest() -> None:
    """Stretches of 10, 2 and 2 seconds, of which the first warms up; the loop took 20 seconds and the step 30."""
    points = [(100, 10.0), (200, 50.0), (300, 50.0)]
    image, checkpoint, around = trial_run.training_seconds(points, loop=20.0, step=30.0)
    assert image == pytest.approx(4 / 200)
    assert checkpoint == pytest.approx(20 - 14)
    assert around == pytest.approx(30 - 300 * image - checkpoint)


def test_a_rehearsed_training_is_whole_stretches(tmp_path: Path) -> None:
    data = config(tmp_path, "data.max_images=100").data
    dataset = write_dataset(open_source(data), str(tmp_path), name="digits", data=data).uri
    chosen = trial_run.train_length(config(tmp_path), dataset)
    stretch = chosen["train.report_every_images"]
    assert stretch % 16 == 0
    assert chosen["train.num_images"] == chosen["train.checkpoint_every_images"] == trial_run.REPORTS * stretch
    assert trial_run.LEAST_STEPS <= chosen["train.num_images"] / 16 <= trial_run.MOST_STEPS


def test_counts_are_those_of_the_source(tmp_path: Path) -> None:
    counts = count(config(tmp_path, "data.max_images=100", "sampling.num_images=41"))
    assert (counts.train_images, counts.test_images, counts.shards, counts.nfe) == (100, 100, 3, 9)


def test_account_is_the_sum_of_all_calls_beside_the_plan(tmp_path: Path) -> None:
    experiment = config(tmp_path, "compute.num_workers=2")
    folder = run_folder(experiment, "run")
    assert costs.ledger(experiment, run="run")["actual"]["steps"] == {}
    planned = {"prices": asdict(load_prices()) | {"currency": "EUR"}, "steps": {"train": {"seconds": 5.0}}}
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "plan.json").write_text(json.dumps(planned))
    (tmp_path / "runs" / "run" / "steps" / "train").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "steps" / "train" / "spent.json").write_text('{"seconds": 1000.0}')

    with pytest.raises(RuntimeError), Step("train", folder, TrainResult, unit="images").timed():
        raise RuntimeError("lost a worker")
    found = costs.ledger(experiment, run="run")
    seconds = found["actual"]["steps"]["train"]["seconds"]
    assert 1000.0 <= seconds < 1060.0
    assert found["actual"]["steps"]["train"]["cpu_hours"] == pytest.approx(2 * seconds / 3600)
    assert found["actual"]["total"]["seconds"] == seconds
    assert found["plan"] == planned
    assert found["prices"]["currency"] == "EUR"
