"""How long a run trains: longer than at first, or no further."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from do import do, recorded
from refused import refused
from workers import assert_same_tensors, train_locally

from ncsn import storage
from ncsn.config import Config, changed_settings, from_yaml, to_yaml
from ncsn.distributed.cluster import ray_cluster
from ncsn.errors import UserError
from ncsn.report.words import next_step
from ncsn.runs.history import load_history
from ncsn.runs.layout import RunFolder, run_folder
from ncsn.runs.record import ForeignRun, read_attempt, read_finished
from ncsn.runs.run import state_to_continue
from ncsn.steps import train
from ncsn.storage.heartbeat import Lease, LeaseExpired
from ncsn.tracking.client import connect
from ncsn.training.loop import TrainingJob


@pytest.fixture(scope="module", autouse=True)
def _one_cluster(config: Config) -> Iterator[None]:
    """Each training would start its own."""
    with ray_cluster(config):
        yield


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
    assert next_step("short", config, folder)[0] == f"ncsn run {folder.options(config)}"

    longer = of_length(config, 24)
    monkeypatch.setattr(train.distributed, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        do("train", longer, "long", dataset=dataset)
    assert not read_finished(folder, "train"), "this checkpoint may be deleted by now"
    monkeypatch.undo()
    whole = do("train", longer, "long", dataset=dataset)
    assert whole.images_seen == 24 and do("train", config, "long", dataset=dataset) == whole
    assert from_yaml(storage.read_text(folder.config)).train.num_images == 24
    train_locally(TrainingJob(longer, dataset), root / "at-once")
    assert_same_tensors(whole.checkpoint, root / "at-once" / "images-000000024")
    command = next_step("short", config, folder)[0]
    assert command == f"ncsn run {folder.options(config)} --set train.num_images=48"


@pytest.mark.parametrize(("decay", "option"), [("cosine", "train.init_from=mine"), ("constant", "train.num_images=16")])
def test_a_schedule_with_an_end_belongs_to_its_length(config, tmp_path, decay, option) -> None:
    short = of_length(config, 8, f"storage.root={tmp_path}", f"optimizer.decay={decay}")
    assert [*changed_settings(short, of_length(short, 16))] == (["train.num_images"] if decay == "cosine" else [])
    folder = RunFolder(str(tmp_path), "mine")
    recorded(folder, "train", result={"images_seen": 8})
    command = next_step("far", short, folder)[0].split()
    assert command[-2:] == ["--set", option] and (folder.config if decay == "cosine" else "mine") in command
    own = "--run" in next_step("copied", short, folder)[0]
    assert own is (decay == "constant"), "half as long is another run"


def test_a_run_continues_another_from_where_its_decay_began(config) -> None:
    def linear(images: int, *overrides: str) -> Config:
        ema = "train.ema={kind: half_life}"
        return of_length(config, images, "optimizer={decay: linear, decay_images: 8}", ema, *overrides)

    start, dataset = "train.continue_from=first", do("ingest", linear(24), "first").uri
    longer = linear(160, start, "name=longer")
    with refused("train.continue_from"):
        do("train", longer, "second", dataset=dataset)
    do("train", linear(24), "first", dataset=dataset)
    first, second = run_folder(config, "first"), run_folder(config, "second")
    for key, wrong in (
        ("train.continue_from", linear(40, "train.continue_from=nobody")),
        ("train.continue_from", linear(40, "train.continue_from=../runs/first")),
        ("train.continue_from", linear(40, start, "seed=1")),
        ("train.continue_from", linear(40, start, "train.ema={kind: decay}")),
        ("train.num_images", linear(16, start)),
        ("train.num_images", linear(40, start, "optimizer.decay_images=28")),
    ):
        with refused(key):
            do("train", wrong, "second", dataset=dataset)
    assert not storage.exists(second.config), "the name is free for the corrected command"
    for length, *others in ((40,), (16,), (40, "seed=1")):
        with refused("--run", error=ForeignRun) as caught:
            do("train", linear(length, *others), "first", dataset=dataset)
        assert (start in caught.value.problems[0].hint) is (length == 40 and not others)
    assert next_step("far", linear(24), first)[0].split()[-4:] == ["--set", start, "--set", "train.num_images=48"]
    assert next_step("far", linear(24), run_folder(config, "old"))[0].endswith("train.init_from=old"), "without a state"
    assert next_step("copied", longer, second)[0].split()[-3] == "train.continue_from=null", "shorter than that state"
    again, whole = (do("train", each, run, dataset=dataset) for each, run in ((longer, "second"), (linear(160), "all")))
    assert_same_tensors(again.checkpoint, whole.checkpoint)
    seen = load_history(second.history).images_seen
    assert seen[:4] == load_history(first.history).images_seen[:4] and len(seen) == len(set(seen)) == 40
    tracked = connect(config).client.get_run(read_attempt(second, "train").mlflow["run_id"])
    assert tracked.data.tags["ncsn.continue_from"] == first.uri


def test_only_a_run_with_the_same_average_continues_another(config) -> None:
    """With train.init_from, the length of the EMA depends on that of the training."""
    settings = ("optimizer={decay: linear, decay_images: 8}", "train.ema={kind: half_life}", "train.init_from=x")
    short, folder = of_length(config, 24, *settings), run_folder(config, "tuned")
    longer = of_length(config, 48, *settings, "train.continue_from=tuned")
    state = storage.join(folder.checkpoints, "before-decay-000000016")
    storage.write_text(folder.config, to_yaml(short))
    storage.write_json(storage.join(state, "checkpoint.json"), {})
    assert next_step("far", short, folder)[0].endswith("train.init_from=tuned")
    assert state_to_continue(from_yaml(to_yaml(longer), overrides=["train.ema.images=2"])) == state


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
