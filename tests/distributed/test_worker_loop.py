"""The training loop without Ray: determinism, resume, divergence, and how it is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from clock import Clock
from local_training import Recorder, assert_same_tensors, tensors, train_for_tensors, train_locally
from refused import refused

from ncsn import storage
from ncsn.config import from_yaml
from ncsn.core.training import StepOptions, train_step
from ncsn.data.training_images import open_cache
from ncsn.model import build
from ncsn.model.checkpoint_store import CheckpointStore
from ncsn.runs.history import load_history
from ncsn.storage import heartbeat
from ncsn.storage.heartbeat import Lease, LeaseExpired
from ncsn.training.batches import draw_batch
from ncsn.training.context import LocalContext, StepTimer
from ncsn.training.loop import TrainingJob, TrainOutcome, train_loop


@pytest.mark.oracle(22)
def test_resume_is_bitwise(tiny: str, dataset: str, tmp_path: Path) -> None:
    """10 steps = 5 + resume + 5 (spec 7.22)."""
    config, halves = from_yaml(tiny), from_yaml(tiny)
    whole = train_for_tensors(config, dataset, tmp_path / "whole")
    sink = Recorder()

    class Killed(Exception):
        pass

    class DiesAfterFirstCheckpoint(CheckpointStore):
        def publish(self, write: Callable[[Path], None], *, name: str) -> None:
            super().publish(write, name=name)
            raise Killed

    job = TrainingJob(config=halves, dataset=dataset, sink=sink)
    with pytest.raises(Killed):
        train_loop(job, LocalContext(), DiesAfterFirstCheckpoint(str(tmp_path / "halves")))
    assert sink.closed
    resumed = Recorder()
    second = train_for_tensors(halves, dataset, tmp_path / "halves", resumed)
    assert [seen for seen, _ in resumed.points] == [96, 128, 160]
    assert whole.keys() == second.keys()
    assert all(torch.equal(whole[key], second[key]) for key in whole)


def test_the_same_config_gives_the_same_weights_and_another_seed_others(
    tiny: str, dataset: str, tmp_path: Path
) -> None:
    one = train_for_tensors(from_yaml(tiny), dataset, tmp_path / "one")
    same = train_for_tensors(from_yaml(tiny), dataset, tmp_path / "same")
    other = train_for_tensors(from_yaml(tiny, overrides=["seed=1"]), dataset, tmp_path / "other")
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_a_complete_run_has_nothing_left_to_do(tiny: str, dataset: str, tmp_path: Path) -> None:
    train_for_tensors(from_yaml(tiny), dataset, tmp_path)
    again = train_locally(TrainingJob(config=from_yaml(tiny), dataset=dataset), tmp_path)
    assert again.images_seen == 160 and again.loss is None and again.checkpoint == "images-000000160"


def test_parts_of_a_batch_are_the_batch(tiny: str, dataset: str) -> None:
    """Images, levels and noise depend on the place in the order, not on which worker draws them."""
    config, split = from_yaml(tiny), open_cache(dataset, "train")
    whole = draw_batch(config, split, first=1250, count=16)
    parts = [draw_batch(config, split, first=1250 + 4 * rank, count=4) for rank in range(4)]
    for name in ("x", "level", "z"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert whole.x.min() >= 0 and whole.x.max() < 1
    assert set(whole.level.tolist()) <= set(range(4))


@pytest.mark.parametrize(("workers", "dropout"), [(2, 0.0), (3, 0.0), (3, 0.3)])
def test_gradients_of_parts_average_to_the_gradient_of_the_batch(
    tiny: str, dataset: str, workers: int, dropout: float
) -> None:
    """1 worker x batch 8, 2 workers x batch 4, and 3 workers with 2, 3 and 3, give the same gradients (1e-6)."""
    config, split = from_yaml(tiny, overrides=[f"network.dropout={dropout}"]), open_cache(dataset, "train")

    def gradients(first: int, count: int, workers: int = 1) -> list[torch.Tensor]:
        state = build.train_state(config)
        with torch.no_grad():
            for parameter in state.network.parameters():
                parameter.add_(0.1)  # the output layer starts at zero and would hide most gradients
        state.optimizer = torch.optim.SGD(state.network.parameters(), lr=0.0)
        train_step(
            state.network,
            draw_batch(config, split, first=first, count=count),
            state=state,
            loss=build.loss(config),
            options=StepOptions(batch_size=8, world_size=workers),
        )
        return [parameter.grad for parameter in state.network.parameters() if parameter.grad is not None]

    class Worker(LocalContext):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank, self.world_size = rank, workers

    shares = [Worker(rank).share(8) for rank in range(workers)]
    assert [place for share in shares for place in share] == list(range(8))
    parts = [gradients(share.start, len(share), workers) for share in shares]
    for together, *each in zip(gradients(0, 8), *parts, strict=True):
        average = torch.stack(each).mean(dim=0)
        assert torch.allclose(together, average, rtol=1e-5, atol=1e-6 * float(together.abs().max() + 1))


@pytest.mark.parametrize(
    "switches",
    [
        ["compute.microbatch=3", "network.dropout=0.2"],
        ["compute.channels_last=true"],
        pytest.param(
            ["compute.compile=true", "compute.channels_last=true", "network.dropout=0.2"], marks=pytest.mark.slow
        ),
    ],
)
def test_a_switch_changes_nothing_but_rounding(tiny: str, dataset: str, tmp_path: Path, switches: list[str]) -> None:
    """Also when it is turned on or off in the middle of a run."""

    def half(folder: Path, overrides: list[str], stop_at: int | None) -> dict[str, torch.Tensor]:
        job = TrainingJob(config=from_yaml(tiny, overrides=overrides), dataset=dataset, stop_at=stop_at)
        name = train_locally(job, folder).checkpoint
        return tensors(folder / name)

    plain = [override for override in switches if not override.startswith("compute")]
    whole = half(tmp_path / "plain", plain, None)
    half(tmp_path / "off-on", plain, 80)
    half(tmp_path / "on-off", switches, 80)
    for folder, overrides in (("off-on", switches), ("on-off", plain)):
        switched = half(tmp_path / folder, overrides, None)
        assert whole.keys() == switched.keys()
        for key, tensor in whole.items():
            assert torch.allclose(tensor, switched[key], rtol=1e-4, atol=1e-5), key


def test_compiling_without_a_compiler_is_a_mistake(
    tiny: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with refused("compute.compile") as caught:
        train_for_tensors(from_yaml(tiny, overrides=["compute.compile=true"]), dataset, tmp_path)
    assert "g++" in str(caught.value)


def test_learning_rate_warms_up_and_falls(tiny: str, dataset: str) -> None:
    config = from_yaml(tiny)
    rates = [build.learning_rate(config, seen) for seen in range(0, 160, 16)]
    assert rates[0] == pytest.approx(config.optimizer.learning_rate / 2 * 1.0)
    assert np.argmax(rates) == 1
    assert rates[-1] < 0.05 * config.optimizer.learning_rate


class Warned(LocalContext):
    """A machine that is about to be preempted."""

    def preempted(self) -> bool:
        return True


class DiesAfterCheckpointInTime(CheckpointStore):
    """The machine is preempted as soon as it has saved."""

    def publish(self, write: Callable[[Path], None], *, name: str) -> None:
        super().publish(write, name=name)
        if name == "images-000000016":
            raise KeyboardInterrupt


def test_a_checkpoint_in_time_leaves_no_trace(tiny: str, dataset: str, tmp_path: Path) -> None:
    """Saved between two reports, and the curves and weights are those of a run that was not disturbed, to the bit."""
    config = from_yaml(tiny)

    def run(
        folder: Path, context: LocalContext, store: type[CheckpointStore] = CheckpointStore
    ) -> dict[str, torch.Tensor]:
        job = TrainingJob(config=config, dataset=dataset, history=str(folder / "history.json"))
        last = folder / train_loop(job, context, store(str(folder))).checkpoint
        return tensors(last)

    whole = run(tmp_path / "whole", LocalContext())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Warned(), DiesAfterCheckpointInTime)
    assert [path.name for path in (tmp_path / "cut").glob("images-*")] == ["images-000000016"]
    resumed = run(tmp_path / "cut", LocalContext())
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    one, other = (load_history(str(tmp_path / name / "history.json")) for name in ("whole", "cut"))
    assert one.images_seen == other.images_seen == [32, 64, 80, 96, 128, 160]
    for name in ("train/loss", "train/grad_norm_max"):
        np.testing.assert_array_equal(one.curve(name), other.curve(name))


def test_a_step_timer_is_the_same_on_all_workers_and_slows_down_gently(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(LocalContext):
        """The other worker's step takes 1 second, this one's no time."""

        world_size = 2

        def sum_over_workers(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + 1.0

    monkeypatch.setattr("ncsn.training.loop.time", Clock())
    timer = StepTimer(Two(), seconds=4.0)
    due = [step for step in range(1, 40) if timer.due()]
    assert due == [1, 3, 7, 15, 23, 31, 39], "2, 4, then every 8 steps of half a second"


def test_rung_by_rung_is_the_same_as_in_one_go(tiny: str, dataset: str, tmp_path: Path, s3_root: str) -> None:
    """Also where the learning rate falls toward the end: a rung does not shorten its schedule."""
    config = from_yaml(tiny, overrides=["train.checkpoint_every_images=1000"])
    train_locally(TrainingJob(config=config, dataset=dataset), tmp_path / "whole")
    for root in (str(tmp_path / "rungs"), s3_root):
        names = []
        for stop_at in (40, 80, None):
            job = TrainingJob(config=config, dataset=dataset, stop_at=stop_at)
            names.append(train_locally(job, storage.join(root, "trial")).checkpoint)
        # 40 is no multiple of the batch size of 16.
        assert names == ["images-000000048", "images-000000080", "images-000000160"]
        assert storage.list_names(storage.join(root, "trial")) == names
        assert_same_tensors(tmp_path / "whole" / names[-1], storage.join(root, "trial", names[-1]))


def test_training_without_a_launcher_saves_a_checkpoint_and_ends(
    tiny: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next attempt goes on from there."""
    monkeypatch.setattr(heartbeat, "LEASE_SECONDS", 0.01)
    config = from_yaml(tiny)

    def attempt(folder: Path, lease: Lease | None = None) -> TrainOutcome:
        job = TrainingJob(config=config, dataset=dataset, lease=lease)
        return train_loop(job, LocalContext(), CheckpointStore(str(folder)))

    beat = tmp_path / "lease.json"
    beat.write_text("the last beat")
    lease = Lease(str(beat), check_seconds=0)
    assert not lease.expired()
    time.sleep(0.05)
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(LeaseExpired):
        attempt(checkpoints, lease)
    assert [path.name for path in checkpoints.iterdir()] == ["images-000000032"]

    assert attempt(checkpoints).images_seen == 160
    assert attempt(tmp_path / "whole").images_seen == 160
    assert_same_tensors(*(tmp_path / name / "images-000000160" for name in ("checkpoints", "whole")))
