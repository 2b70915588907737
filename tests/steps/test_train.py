"""How long a run trains: longer than at first, or no further."""

from __future__ import annotations

from pathlib import Path

import pytest
from do import do
from refused import refused
from workers import assert_same_tensors, train_locally

from ncsn import storage
from ncsn.config import Config, changed_settings, from_yaml, to_yaml
from ncsn.errors import UserError
from ncsn.report.words import next_step
from ncsn.runs.folder import RunFolder, read_step, run_folder, update_step
from ncsn.steps import train
from ncsn.storage.heartbeat import Lease, LeaseExpired
from ncsn.training.loop import TrainingJob


def of_length(config: Config, images: int, *overrides: str) -> Config:
    return from_yaml(to_yaml(config), overrides=[f"train.num_images={images}", *overrides])


def test_a_run_ends_with_what_it_has_and_goes_on_to_any_length(config, root, monkeypatch) -> None:
    config = of_length(config, 16)
    dataset, folder = do("ingest", config, "long").uri, run_folder(config, "long")
    with refused("--finish", error=UserError):
        do("train", config, "long", dataset=dataset, finish=True)
    train_locally(TrainingJob(config, dataset, stop_at=8), folder.checkpoints)
    (Path(folder.checkpoints) / "images-000000008").rename(Path(folder.checkpoints) / "resume-000000008")
    early = do("train", config, "long", dataset=dataset, finish=True)
    assert (early.images_seen, early.checkpoint) == (8, f"{folder.checkpoints}/images-000000008")
    assert do("train", config, "long", dataset=dataset, finish=True) == early
    assert next_step("short", config, folder)[0] == f"ncsn run {folder.options}"

    longer = of_length(config, 24)
    monkeypatch.setattr(train.distributed, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        do("train", longer, "long", dataset=dataset)
    assert not read_step(folder, "train").result, "this checkpoint may be deleted by now"
    monkeypatch.undo()
    whole = do("train", longer, "long", dataset=dataset)
    assert whole.images_seen == 24 and do("train", config, "long", dataset=dataset) == whole
    assert from_yaml(storage.read_text(folder.config)).train.num_images == 24
    train_locally(TrainingJob(longer, dataset), root / "at-once")
    assert_same_tensors(whole.checkpoint, root / "at-once" / "images-000000024")
    command = next_step("short", config, folder)[0]
    assert command == f"ncsn run {folder.options} --set train.num_images=48"


@pytest.mark.parametrize(("decay", "option"), [("cosine", "train.init_from=mine"), ("constant", "train.num_images=16")])
def test_a_schedule_with_an_end_belongs_to_its_length(config, tmp_path, decay, option) -> None:
    short = of_length(config, 8, f"storage.root={tmp_path}", f"optimizer.decay={decay}")
    assert [*changed_settings(short, of_length(short, 16))] == (["train.num_images"] if decay == "cosine" else [])
    folder = RunFolder(str(tmp_path), "mine")
    update_step(folder, "train", result={"images_seen": 8})
    command = next_step("far", short, folder)[0].split()
    assert command[-2:] == ["--set", option] and folder.config in command
    own = "--run" in next_step("copied", short, folder)[0]
    assert own is (decay == "constant"), "half as long is another run"


def test_a_lease_that_ends_lets_training_save_first(config, root, monkeypatch) -> None:
    """Other steps end at once by their progress."""

    def train_without_a_launcher(job: TrainingJob, **_: object) -> None:
        monkeypatch.setattr(Lease, "expired", lambda _: True)
        job.progress.start(2, "images")
        job.progress.advance()
        assert job.lease is not None
        raise LeaseExpired("saved")

    monkeypatch.setattr(train.distributed, "train", train_without_a_launcher)
    dataset = do("ingest", config, "leased").uri
    with pytest.raises(LeaseExpired, match="saved"):
        do("train", config, "leased", dataset=dataset, lease=f"{root}/lease")
