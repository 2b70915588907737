"""Training with two averages: their snapshots, and a resume with both."""

from __future__ import annotations

from pathlib import Path

from local_training import assert_same_tensors, train_locally, train_until_killed
from safetensors.torch import load_file

from ncsn.config import from_yaml
from ncsn.model.averages import build_average, snapshots
from ncsn.model.checkpoint import load_for_sampling
from ncsn.training.loop import TrainingJob

POWER = ["train.ema={kind: power, relative_widths: [0.05, 0.2], keep_every_images: 48}", "train.keep_checkpoints=1"]


def test_a_resumed_training_has_the_same_averages_and_snapshots(tiny: str, dataset: str, tmp_path: Path) -> None:
    config = from_yaml(tiny, overrides=POWER)
    runs = [tmp_path / name for name in ("whole", "halves")]
    whole, halves = (TrainingJob(config=config, dataset=dataset, averages=str(run / "ema")) for run in runs)
    outcome = train_locally(whole, runs[0] / "checkpoints")
    train_until_killed(halves, runs[1] / "checkpoints")
    assert snapshots(halves.averages or "") == [48]
    train_locally(halves, runs[1] / "checkpoints")
    places = [run / "checkpoints" / outcome.checkpoint for run in runs]
    assert_same_tensors(*places)
    for file in ("ema_2.safetensors", *(f"../../ema/images-{seen:09d}/0.050.safetensors" for seen in (96, 144, 160))):
        one, other = (load_file(place / file) for place in places)
        assert all(one[name].equal(other[name]) for name in one)
    assert [snapshots(str(run / "ema")) for run in runs] == [[48, 96, 144, 160]] * 2
    built = load_for_sampling(build_average(str(places[0]), config, relative_width=0.1))
    assert built.images_seen == 160 and built.average is not None and len(built.average["coefficients"]) == 8


def test_snapshots_are_a_sixteenth_apart_and_decide_no_weights(tiny: str) -> None:
    one, other = (from_yaml(tiny, overrides=[f"train.ema={text}"]) for text in ("{kind: power}", POWER[0][10:]))
    assert (one.train.snapshot_every, other.train.snapshot_every) == (10, 48)
    assert from_yaml(tiny).train.snapshot_every is None
