"""Trainings that stop early, and the checkpoint that they call the best."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from kills_worker import KillsWorker
from local_training import assert_same_tensors, train_locally
from ray_driver import ray_driver
from refused import refused

from ncsn import storage
from ncsn.config import from_yaml
from ncsn.distributed import trainer
from ncsn.distributed.validation import sample_distance
from ncsn.model.checkpoint_store import CheckpointStore
from ncsn.runs.curves import FID
from ncsn.runs.history import load_history
from ncsn.steps import train
from ncsn.tracking.client import connect
from ncsn.training.context import LocalContext
from ncsn.training.loop import TrainingJob, TrainOutcome, train_loop

# Only a fall by nine tenths counts, so that the first measurement stays the best.
STOP = "train.stop={by: %s, patience_images: 64, tolerance: 0.9}"
MEASURED = ["train.validation={images: 20, samples: 16}", "train.checkpoint_every_images=32"]
SAMPLES = [
    *MEASURED,
    STOP % "fid",
    "sampling.sampler={kind: probability_flow}",
    "train.best_by=validation",
    "evaluation.classifier_epochs=1",
]


def measured(uri: str, name: str) -> dict[int, float]:
    history = load_history(uri)
    pairs = zip(history.images_seen, history.points, strict=True)
    return {seen: point[name] for seen, point in pairs if name in point}


def test_a_resumed_training_stops_where_the_whole_one_does(tiny: str, dataset: str, tmp_path: Path) -> None:
    config = from_yaml(tiny, overrides=[*MEASURED, STOP % "validation"])

    def run(name: str, stop_at: int | None = None) -> tuple[int, str, str]:
        job = TrainingJob(
            config=config, dataset=dataset, history=str(tmp_path / name / "history.json"), stop_at=stop_at
        )
        outcome = train_locally(job, tmp_path / name / "checkpoints")
        return outcome.images_seen, outcome.checkpoint, outcome.stopped

    whole = run("whole")
    assert whole[:2] == (96, "images-000000096") and "val/loss" in whole[2]
    assert run("whole") == whole, "nothing is left to do"
    for cut in (32, 64):
        assert run(f"cut-{cut}", stop_at=cut) == (cut, f"images-{cut:09d}", "")
        assert run(f"cut-{cut}") == whole
        assert_same_tensors(*(tmp_path / each / "checkpoints" / whole[1] for each in ("whole", f"cut-{cut}")))


def test_it_stops_and_saves_between_checkpoints(tiny: str, dataset: str, tmp_path: Path) -> None:
    validation = "train.validation={every_images: 48, images: 20}"
    told: list[tuple[int, int]] = []
    job = TrainingJob(
        config=from_yaml(tiny, overrides=[validation, STOP % "validation", "train.ema={kind: power}"]),
        dataset=dataset,
        history=str(tmp_path / "history.json"),
        averages=str(tmp_path / "ema"),
        progress=lambda done, total: told.append((done, total)),
    )
    outcome = train_locally(job, tmp_path / "checkpoints")
    assert (outcome.images_seen, outcome.checkpoint) == (144, "images-000000144")
    assert list(measured(str(job.history), "val/loss")) == [48, 96, 144]
    assert told[-2:] == [(128, 160), (144, 144)]
    assert storage.list_names(str(job.averages))[-1] == "images-000000144", "the last averages belong to it"


def test_the_best_checkpoint_has_the_lowest_held_out_loss(tiny: str, dataset: str, tmp_path: Path) -> None:
    lognormal = ["noise.training={kind: lognormal}", "train.validation={every_images: 80, images: 20}"]
    config = from_yaml(tiny, overrides=[*lognormal, "train.checkpoint_every_images=16", "train.best_by=validation"])
    best = str(tmp_path / "best")
    job = TrainingJob(config=config, dataset=dataset, history=str(tmp_path / "history.json"))
    train_loop(job, LocalContext(), CheckpointStore(str(tmp_path / "checkpoints"), best=best, best_by="validation"))
    losses = measured(str(job.history), "val/loss_edm")
    assert list(losses) == [80, 160]
    record = json.loads((tmp_path / "best" / "best.json").read_text())
    seen = min(losses, key=lambda each: losses[each])
    assert record == {"checkpoint": f"images-{seen:09d}", "loss": losses[seen], "by": "validation"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_on_ray_does_not_move_the_stop(
    tiny: str, dataset: str, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By samples of two workers, of which one is killed between the second measurement and the third."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    config = from_yaml(tiny, overrides=[*SAMPLES, "compute.num_workers=2"])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "helpers"), prepend=os.pathsep)
    kill = KillsWorker(80, tmp_path / "killed")
    job = TrainingJob(
        config=config,
        dataset=dataset,
        progress=kill,
        history=str(tmp_path / "history.json"),
        distance=sample_distance(config, dataset),
    )
    with ray_driver(config) as (driver, _):
        outcome = driver(trainer.train, job, run_uri=str(tmp_path))
    assert (outcome.images_seen, outcome.checkpoint) == (96, "images-000000096") and FID in outcome.stopped
    assert kill.done.exists()
    found, losses = (measured(str(job.history), name) for name in (FID, "val/loss"))
    assert list(found) == list(losses) == [32, 64, 96]
    best = json.loads((tmp_path / "best" / "best.json").read_text())
    assert best["loss"] == min(losses.values()) and best["by"] == "validation"

    alone = replace(job, config=from_yaml(tiny, overrides=SAMPLES), progress=None, history=str(tmp_path / "1.json"))
    assert train_locally(alone, tmp_path / "alone").images_seen == 96
    # A gray value may be rounded to its neighbor.
    assert measured(str(alone.history), FID) == pytest.approx(found, rel=0.02)


def test_the_step_says_why_it_stopped(tiny: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locally(job: TrainingJob, *, run_uri: str) -> TrainOutcome:
        return train_locally(job, storage.join(run_uri, "checkpoints"))

    monkeypatch.setattr(trainer, "train", locally)
    monkeypatch.setattr(train, "ray_cluster", lambda *_, **__: nullcontext())
    config = from_yaml(tiny, overrides=[*SAMPLES, f"storage.root={tmp_path}"])
    result = train.run(config, run="mine", dataset=dataset)
    assert result.images_seen == 96 and FID in result.stopped and result.stopped in result.notes
    assert train.run(config, run="mine", dataset=dataset) == result
    (found,) = connect(config).client.search_runs(["1"], "tags.`train.stopped` != ''")
    assert found.data.tags["train.stopped"] == result.stopped


def test_a_judgment_by_what_is_never_measured_is_refused(tiny: str, dataset: str, tmp_path: Path) -> None:
    # 160 images in all, of which two percent are no measurement.
    for key, override in (("train.best_by", "train.best_by=validation"), ("train.stop.by", STOP % "validation")):
        config = from_yaml(tiny, overrides=[f"storage.root={tmp_path}", override])
        with refused(key):
            train.run(config, run=key.replace(".", "-").replace("_", "-"), dataset=dataset)
