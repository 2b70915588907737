"""The training loop without Ray: determinism, resume, how it is stopped, and several workers that average over gloo."""

from __future__ import annotations

import faulthandler
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.multiprocessing
from clock import Clock
from pretended_gpu import pretended_gpu
from refused import refused
from torch import nn
from workers import (
    Recorder,
    assert_close_tensors,
    assert_same_tensors,
    assert_same_training,
    average_gradients,
    hang,
    resume_from_a_torn_copy,
    tensors,
    train,
    train_locally,
    train_until_killed,
    work,
    work_in_graphs,
)

from ncsn import storage
from ncsn.config import from_yaml
from ncsn.data.training_images import CachedSplit
from ncsn.model import build
from ncsn.model.checkpoint import CheckpointStore
from ncsn.progress import Progress
from ncsn.runs.history import load_history
from ncsn.storage import heartbeat
from ncsn.storage.heartbeat import Lease, LeaseExpired
from ncsn.training import context as training_context, loop
from ncsn.training.context import StepTimer, WorkerContext, fits_cuda_graphs, prepare_network
from ncsn.training.loop import DivergedError, TrainingJob, train_loop

MUON = ["optimizer={warmup_images: 32, decay: linear, decay_images: 80, muon: {learning_rate: 0.02}}"]


@pytest.mark.oracle(22)
@pytest.mark.parametrize("overrides", [[], MUON], ids=["adam", "muon"])
def test_resume_is_bitwise(tiny: str, dataset: str, tmp_path: Path, overrides: list[str]) -> None:
    """10 steps = 5 + resume + 5 (spec 7.22). Who watches never sees that it began anew."""

    class Shown(Progress):
        shown: ClassVar[list[int]] = []

        def changed(self) -> None:
            self.shown.append(self.done)

    config, sink, resumed = from_yaml(tiny, overrides=overrides), Recorder(), Recorder()
    whole = train(config, dataset, tmp_path / "whole")
    train_until_killed(TrainingJob(config=config, dataset=dataset, sink=sink), tmp_path / "halves")
    assert sink.closed
    job = TrainingJob(config=config, dataset=dataset, sink=resumed, progress=Shown())
    second = tmp_path / "halves" / train_locally(job, tmp_path / "halves").checkpoint
    assert Shown.shown == [80, 96, 112, 128, 144, 160]
    assert [seen for seen, _ in resumed.points] == [96, 128, 160]
    assert_same_tensors(whole, second)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_longer_training_goes_on_from_where_the_decay_began(tiny, dataset, tmp_path, workers) -> None:
    """The same as one of this length from the start. A kill and few checkpoints do not lose the state."""

    def job(length: int, state: str | None = None) -> TrainingJob:
        settings = ["optimizer={decay: linear, decay_images: 16}", "train.ema={kind: half_life}"]
        return TrainingJob(from_yaml(tiny, overrides=[*settings, f"train.num_images={length}"]), dataset, state=state)

    def trained(name: str, job: TrainingJob) -> Path:
        folder = tmp_path / name / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        if workers == 1:
            train_loop(job, WorkerContext(), CheckpointStore(str(folder), keep=1 if name == "short" else None))
        else:
            torch.multiprocessing.spawn(work, (workers, job, str(tmp_path / name)), nprocs=workers)
        return folder

    if workers == 1:
        train_until_killed(job(112), tmp_path / "short" / "checkpoints", at="before-decay")
    state = trained("short", job(112)) / "before-decay-000000096"
    again, whole = trained("longer", job(160, str(state))), trained("whole", job(160))
    last = "images-000000160"
    assert storage.list_names(str(again)) == ["before-decay-000000144", last], "and none at 80, where it has not been"
    assert_same_tensors(again / last, whole / last)
    trial = trained("trial", replace(job(112), stop_at=112))
    assert [name for name in storage.list_names(str(trial)) if "decay" in name] == [], "nobody trains it longer"


def test_another_seed_gives_other_weights_and_a_complete_run_has_nothing_left_to_do(tiny, dataset, tmp_path) -> None:
    one = tensors(train(from_yaml(tiny), dataset, tmp_path / "one"))
    other = tensors(train(from_yaml(tiny, overrides=["seed=1"]), dataset, tmp_path / "other"))
    assert not all(torch.equal(one[key], other[key]) for key in one)
    again = train_locally(TrainingJob(config=from_yaml(tiny), dataset=dataset), tmp_path / "one")
    assert (again.images_seen, again.loss, again.checkpoint) == (160, None, "images-000000160")


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

    def half(folder: Path, overrides: list[str], stop_at: int | None) -> Path:
        job = TrainingJob(config=from_yaml(tiny, overrides=overrides), dataset=dataset, stop_at=stop_at)
        return folder / train_locally(job, folder).checkpoint

    plain = [override for override in switches if not override.startswith("compute")]
    whole = half(tmp_path / "plain", plain, None)
    half(tmp_path / "off-on", plain, 80)
    half(tmp_path / "on-off", switches, 80)
    for folder, overrides in (("off-on", switches), ("on-off", plain)):
        assert_close_tensors(whole, half(tmp_path / folder, overrides, None))


class Pair(WorkerContext):
    """The other worker gives 1: its step takes a second, and it lacks a compiler."""

    def sum_over_workers(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1.0


def test_where_a_worker_lacks_a_compiler_none_compiles(tiny, monkeypatch, caplog) -> None:
    def compiled(context: WorkerContext, *overrides: str) -> bool:
        network = nn.Identity()
        prepare_network(network, from_yaml(tiny, overrides=overrides), context)
        return network._compiled_call_impl is not None

    gpu = "compute.use_gpu=true"
    assert compiled(WorkerContext(), gpu) and caplog.messages == []
    assert not compiled(Pair(), gpu) and len(caplog.messages) == 1
    assert not compiled(Pair()) and len(caplog.messages) == 1, "not on a CPU, so nothing lacks"
    assert not compiled(Pair(), gpu, "loss={kind: ssm}") and len(caplog.messages) == 1
    monkeypatch.setenv("PATH", "")
    assert not compiled(WorkerContext(), gpu) and len(caplog.messages) == 2
    with refused("compute.compile"):
        compiled(WorkerContext(), "compute.compile=true")


def test_cuda_graphs_are_for_one_pass_of_few_images(tiny: str) -> None:
    """The same on all workers, whose shares differ."""

    def fit(images: int, *, workers: int = 1, nodes: int = 1, microbatch: str = "null", device: str = "cuda") -> bool:
        settings = ["train.num_images=10000", f"train.batch_size={images}", f"compute.microbatch={microbatch}"]
        config, contexts = from_yaml(tiny, overrides=settings), [WorkerContext(device) for _ in range(workers)]
        for rank, context in enumerate(contexts):
            context.rank, context.world_size, context.spans_nodes = rank, workers, nodes > 1
        (found,) = {fits_cuda_graphs(config, context) for context in contexts}
        return found

    assert fit(128) and fit(128, microbatch="128") and fit(256, workers=2)
    refused = fit(129), fit(128, microbatch="127"), fit(256, workers=2, nodes=2), fit(128, device="cpu")
    assert not any(refused)
    for workers in (2, 3, 5, 7):
        for limit in (64, 128):
            for more in (-1, 0, 1, workers - 1):
                assert fit(workers * limit + more, workers=workers, microbatch=str(limit)) == (more <= 0)


def test_gradients_of_any_memory_format_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(3))
    found = [torch.rand(4, 3, 3, 3).contiguous(memory_format=torch.channels_last), torch.rand(5), torch.rand(3, 4)]
    means = [1.5 * each for each in found]
    WorkerContext(world_size=2).average(found)
    assert all(map(torch.equal, found, means))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # of a copy of a network
def test_a_step_and_what_follows_it_wait_once_for_a_gpu(tiny, dataset, tmp_path, monkeypatch) -> None:
    config = from_yaml(tiny, overrides=["compute={use_gpu: true, compile: false}", "noise.training={kind: lognormal}"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "")
    monkeypatch.setattr(loop, "machine_usage", lambda _: {})
    monkeypatch.setattr(loop.Training, "_newest_checkpoint", lambda _: None)  # which reads a value
    with pretended_gpu() as gpu:
        job = TrainingJob(config=config, dataset=dataset, sink=Recorder())
        training = loop.Training(job, WorkerContext("cuda:0"), CheckpointStore(str(tmp_path)))
        for _ in range(2):
            gpu.calls.clear()
            training.step()
            assert training.timer.due()
            training.save_between()
            training.timer = StepTimer(training.context, seconds=0.0)
    assert sum(call.waits for call in gpu.calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_compiled_and_compressed_gradients_are_the_mean_of_all_workers(tiny: str, tmp_path: Path, workers: int) -> None:
    config = from_yaml(tiny, overrides=["compute.compile=true"])
    torch.multiprocessing.spawn(average_gradients, (workers, config, str(tmp_path)), nprocs=workers)


def test_learning_rate_warms_up_and_falls(tiny: str) -> None:
    config = from_yaml(tiny)
    rates = [build.learning_rate(config, seen) for seen in range(0, 160, 16)]
    assert rates[0] == pytest.approx(config.optimizer.learning_rate / 2 * 1.0)
    assert np.argmax(rates) == 1
    assert rates[-1] < 0.05 * config.optimizer.learning_rate


def test_a_linear_decay_begins_late(tiny: str) -> None:
    for images, falls in (("null", 160 / 3), ("40", 40)):
        config = from_yaml(tiny, overrides=[f"optimizer={{learning_rate: 0.5, decay: linear, decay_images: {images}}}"])
        rates = [build.learning_rate(config, seen) for seen in range(0, 161, 16)]
        assert rates == pytest.approx([0.5 * min(1, (160 - seen) / falls) for seen in range(0, 161, 16)])
    assert build.learning_rate(config, 140, peak=0.1) == pytest.approx(0.05)


def test_a_checkpoint_in_time_leaves_a_point_and_the_same_weights(tiny, dataset, tmp_path, monkeypatch) -> None:
    """Saved between two reports, and the weights are those of a run that was not disturbed, to the bit."""
    jobs = {
        name: TrainingJob(config=from_yaml(tiny), dataset=dataset, history=str(tmp_path / name / "history.json"))
        for name in ("whole", "cut")
    }
    last = train_locally(jobs["whole"], tmp_path / "whole").checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(WorkerContext, "preempted", lambda _: True)
        train_until_killed(jobs["cut"], tmp_path / "cut", at="resume-000000016")
    assert [path.name for path in (tmp_path / "cut").iterdir() if path.is_dir()] == ["resume-000000016"]
    train_locally(jobs["cut"], tmp_path / "cut")
    assert storage.list_names(str(tmp_path / "cut")) == ["history.json", "images-000000080", "images-000000160"]
    assert_same_tensors(*(tmp_path / name / last for name in jobs))
    one, other = (load_history(str(tmp_path / name / "history.json")) for name in ("whole", "cut"))
    assert (one.images_seen, other.images_seen) == ([32, 64, 80, 96, 128, 160], [16, 32, 64, 80, 96, 128, 160])
    for name in ("train/loss", "train/grad_norm_max"):
        np.testing.assert_array_equal(one.curve(name)[1:], other.curve(name)[2:])


@pytest.mark.parametrize(
    ("seen", "facts"),
    [(96, ("loss nan", "images_seen = 128")), (144, ("norm nan", "images_seen = 160"))],
    ids=["of weights", "of the last gradient"],
)
def test_a_nan_ends_training_and_is_forgotten_by_the_same_command(
    tiny, dataset, tmp_path, monkeypatch, seen, facts
) -> None:
    def run(name: str) -> None:
        job = TrainingJob(config=from_yaml(tiny), dataset=dataset, history=str(tmp_path / name / "history.json"))
        train_locally(job, tmp_path / name / "checkpoints")

    step = loop.Training.step

    def broken(training: loop.Training) -> None:
        if training.state.images_seen == seen:
            next(training.state.network.parameters()).register_hook(lambda gradient: gradient * math.nan)
        step(training)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "step", broken)
        with refused("optimizer.learning_rate", error=DivergedError) as caught:
            run("again")
    assert all(fact in str(caught.value) for fact in (*facts, "images-000000080"))
    run("again")
    run("whole")
    assert_same_training(str(tmp_path / "whole"), str(tmp_path / "again"))


def test_a_checkpoint_every_few_minutes_is_for_a_resume_alone(tiny, dataset, tmp_path, monkeypatch) -> None:
    """Training resumes from the newest of both kinds, and nothing else sees it."""
    config = from_yaml(tiny)
    job = TrainingJob(config=config, dataset=dataset)
    whole = tmp_path / "whole" / train_locally(job, tmp_path / "whole").checkpoint
    monkeypatch.setattr("ncsn.training.loop.RESUME_SECONDS", 0.0)
    monkeypatch.setattr("ncsn.training.loop.CHECK_SECONDS", 0.0)  # after each step
    for at in ("resume-000000064", "resume-000000112", "resume-000000128"):
        train_until_killed(job, tmp_path / "cut", at=at)
        kept = [] if at == "resume-000000064" else ["images-000000080"]
        assert storage.list_names(str(tmp_path / "cut")) == [*kept, at]
        assert list(CheckpointStore(str(tmp_path / "cut")).names()) == kept
    # A job that has become shorter has its last checkpoint there.
    shutil.copytree(tmp_path / "cut", tmp_path / "shorter")
    shorter = TrainingJob(config=config, dataset=dataset, stop_at=96)
    assert train_locally(shorter, tmp_path / "shorter").checkpoint == "images-000000128"
    outcome = train_locally(job, tmp_path / "cut")
    assert storage.list_names(str(tmp_path / "cut")) == ["images-000000080", outcome.checkpoint]
    assert_same_tensors(whole, tmp_path / "cut" / outcome.checkpoint)


def test_a_step_timer_is_the_same_on_all_workers_and_slows_down_gently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncsn.training.loop.time", Clock())
    timer = StepTimer(Pair(world_size=2), seconds=4.0)
    due = [step for step in range(1, 40) if timer.due() and timer.exchange(2.0) == [3.0]]
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


def test_training_that_is_told_to_end_or_has_no_launcher_saves_a_checkpoint_and_ends(
    tiny: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next attempt goes on from there."""
    monkeypatch.setattr(heartbeat, "LEASE_SECONDS", 0.01)
    lease = Lease(str(tmp_path / "none"), check_seconds=0)
    assert not lease.expired()
    time.sleep(0.05)
    (stop := tmp_path / "stop").touch()
    for order, name in ({"lease": lease}, "resume-000000016"), ({"stop": str(stop)}, "resume-000000032"):
        with pytest.raises(LeaseExpired):
            train_locally(TrainingJob(config=from_yaml(tiny), dataset=dataset, **order), tmp_path / "checkpoints")
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [name]
    whole, again = (train(from_yaml(tiny), dataset, tmp_path / name) for name in ("whole", "checkpoints"))
    assert_same_tensors(whole, again)


@pytest.mark.slow
def test_any_number_of_workers_follows_the_same_curve(tiny: str, dataset: str, tmp_path: Path) -> None:
    def job(name: str, *overrides: str) -> TrainingJob:
        (tmp_path / name).mkdir()
        history = str(tmp_path / name / "history.json")
        return TrainingJob(config=from_yaml(tiny, overrides=overrides), dataset=dataset, history=history)

    train_locally(job("1"), tmp_path / "1" / "checkpoints")
    one = load_history(str(tmp_path / "1" / "history.json"))
    # Three have 5, 5 and 6 images, so the last one makes two passes.
    for workers, overrides in ((2, ["compute.microbatch=3"]), (3, ["compute.microbatch=5"]), (4, [])):
        folder = tmp_path / str(workers)
        torch.multiprocessing.spawn(work, (workers, job(str(workers), *overrides), str(folder)), nprocs=workers)
        many = load_history(str(folder / "history.json"))
        assert many.images_seen == one.images_seen
        for name in (name for name in one.points[-1] if name.startswith(("train/loss", "train/grad"))):
            np.testing.assert_allclose(many.curve(name), one.curve(name), rtol=1e-4)
        assert_close_tensors(*(place / "checkpoints" / "images-000000160" for place in (tmp_path / "1", folder)))


@pytest.mark.slow
def test_two_workers_resume_with_muon(tiny: str, dataset: str, tmp_path: Path) -> None:
    config = from_yaml(tiny, overrides=MUON)
    for name, stops in (("whole", [None]), ("halves", [80, None])):
        (tmp_path / name).mkdir()
        for stop in stops:
            job = TrainingJob(config, dataset, stop_at=stop)
            torch.multiprocessing.spawn(work, (2, job, str(tmp_path / name)), nprocs=2)
            (tmp_path / name / "meeting").unlink(missing_ok=True)
    last = "checkpoints/images-000000160"
    assert_same_tensors(tmp_path / "whole" / last, tmp_path / "halves" / last)
    assert_close_tensors(train(config, dataset, tmp_path / "one"), tmp_path / "whole" / last, rtol=1e-2)


@pytest.mark.slow
def test_two_workers_learn_the_weight_of_one(tiny: str, dataset: str, tmp_path: Path) -> None:
    """At any sigma, with a weight that is learned beside the network; also where they average as with CUDA graphs."""
    learning = ["noise={training: {kind: lognormal}}", "loss.weighting=learned", "train.ema={kind: half_life}"]
    job = TrainingJob(config=from_yaml(tiny, overrides=learning), dataset=dataset)
    one = tmp_path / "1" / train_locally(job, tmp_path / "1").checkpoint

    def weight(place: Path) -> list[float]:
        found: list[float] = json.loads((place / "state.json").read_text())["uncertainty"]["weight"]
        return found

    assert max(map(abs, weight(one))) > 1e-4
    for name, worker in (("2", work), ("3", work_in_graphs)):
        (tmp_path / name).mkdir()
        torch.multiprocessing.spawn(worker, (2, job, str(tmp_path / name)), nprocs=2)
        other = tmp_path / name / "checkpoints" / one.name
        np.testing.assert_allclose(weight(other), weight(one), rtol=1e-3, atol=1e-6)
        assert_close_tensors(one, other)


@pytest.mark.slow
def test_a_copy_that_is_torn_on_one_worker_ends_all(tiny: str, dataset: str, tmp_path: Path) -> None:
    """None waits for a worker that has ended, and what is whole in the store stays there."""
    job = TrainingJob(config=from_yaml(tiny), dataset=dataset)
    train_locally(TrainingJob(config=job.config, dataset=dataset, stop_at=80), tmp_path / "checkpoints")
    torch.multiprocessing.spawn(resume_from_a_torn_copy, (2, job, str(tmp_path)), nprocs=2)
    found = {file.name: file.read_text() for file in tmp_path.glob("mistake-*")}
    assert found == dict.fromkeys(("mistake-0", "mistake-1"), "weights.safetensors differs from its checksum")
    assert CheckpointStore(str(tmp_path / "checkpoints")).newest() == "images-000000080"


@pytest.mark.parametrize(
    ("each", "longest", "fetching", "guarded", "ends"),
    [
        pytest.param(0.0, 20.0, False, True, True, id="hangs"),
        pytest.param(0.1, 0.4, False, True, False, id="slow"),
        pytest.param(0.0, 0.8, True, True, False, id="waits for the store"),
        pytest.param(0.0, 0.8, False, False, False, id="in a notebook"),
    ],
)
def test_a_worker_that_hangs_ends(tiny, dataset, tmp_path, monkeypatch, each, longest, fetching, guarded, ends):
    """A step may take 0.2 s in any case. Each draw takes some time, and the fourth longer, until the process ends."""
    orders, draws, draw_batch, stacks = [], [], loop.draw_batch, tmp_path / "hung" / "worker-0.txt"

    def slow_draw(*args, first, **given):
        draws.append(first)
        until = time.monotonic() + (longest if first == 48 else each)
        while time.monotonic() < until and not stacks.exists():
            time.sleep(0.01)
        return draw_batch(*args, first=first, **given)

    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda _, **order: orders.append(order))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: orders.append("canceled"))
    monkeypatch.setattr(training_context, "STEP_SECONDS", 0.2)
    monkeypatch.setattr(training_context, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(loop, "draw_batch", slow_draw)
    monkeypatch.setattr(loop, "CHECK_SECONDS", 0.0)  # steps are looked at one by one, as where they are slow
    monkeypatch.setattr(CachedSplit, "fetching", fetching)
    context, job = WorkerContext(), TrainingJob(config=from_yaml(tiny), dataset=dataset)
    context.hung = str(stacks.parent) if guarded else None
    train_loop(job, context, CheckpointStore(str(tmp_path / "checkpoints")))
    assert draws == list(range(0, 160, 16))
    # Here it goes on after all, and the process may get other work.
    assert orders == ([{"exit": True, "file": 2}, "canceled"] if ends else [])
    assert stacks.exists() == ends and (not ends or "in slow_draw" in stacks.read_text())


@pytest.mark.slow
def test_one_of_four_hangs_after_another_was_long_at_a_checkpoint(tiny, dataset, tmp_path):
    """All of them end soon, and their stacks say which one hangs."""
    job = TrainingJob(config=from_yaml(tiny, overrides=["train.checkpoint_every_images=32"]), dataset=dataset)
    workers = torch.multiprocessing.spawn(hang, (4, job, str(tmp_path)), nprocs=4, join=False).processes
    for worker in workers:
        worker.join(60)
        worker.kill()
    assert [worker.exitcode for worker in workers] == [1] * 4
    assert list(CheckpointStore(str(tmp_path / "checkpoints")).names())[-1] == "images-000000032"
    stacks = [(tmp_path / "hung" / f"worker-{rank}.txt").read_text() for rank in range(4)]
    assert ["time.sleep(600)" in stack for stack in stacks] == [False, False, True, False]
