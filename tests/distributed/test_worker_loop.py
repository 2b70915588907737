"""The training loop without Ray: determinism, resume, how it is stopped, and several workers that average over gloo."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.multiprocessing
from clock import Clock
from pretended_gpu import pretended_gpu
from refused import refused
from safetensors.torch import load_file
from torch import nn
from workers import (
    Recorder,
    assert_close_tensors,
    assert_same_tensors,
    average_gradients,
    resume_from_a_torn_copy,
    tensors,
    train,
    train_locally,
    train_until_killed,
    work,
    work_in_graphs,
)

from ncsn import storage
from ncsn.config import Config, from_yaml
from ncsn.errors import InvalidValue
from ncsn.evaluation.extractors import full_float32
from ncsn.model import build, generate
from ncsn.model.averages import build_average, snapshots
from ncsn.model.checkpoint import CheckpointStore, load_checkpoint
from ncsn.progress import Progress
from ncsn.runs.history import load_history
from ncsn.storage import heartbeat
from ncsn.storage.heartbeat import Lease, LeaseExpired
from ncsn.training import held_out, loop, monitor
from ncsn.training.context import StepTimer, WorkerContext, fits_cuda_graphs, prepare_network
from ncsn.training.loop import TrainingJob, TrainOutcome, train_loop


@pytest.mark.oracle(22)
def test_resume_is_bitwise(tiny: str, dataset: str, tmp_path: Path) -> None:
    """10 steps = 5 + resume + 5 (spec 7.22). Who watches never sees that it began anew."""

    class Shown(Progress):
        shown: ClassVar[list[int]] = []

        def changed(self) -> None:
            self.shown.append(self.done)

    config, sink, resumed = from_yaml(tiny), Recorder(), Recorder()
    whole = train(config, dataset, tmp_path / "whole")
    train_until_killed(TrainingJob(config=config, dataset=dataset, sink=sink), tmp_path / "halves")
    assert sink.closed
    job = TrainingJob(config=config, dataset=dataset, sink=resumed, progress=Shown())
    second = tmp_path / "halves" / train_locally(job, tmp_path / "halves").checkpoint
    assert Shown.shown == [80, 96, 112, 128, 144, 160]
    assert [seen for seen, _ in resumed.points] == [96, 128, 160]
    assert_same_tensors(whole, second)


def test_a_resumed_training_has_the_same_averages_and_snapshots(tiny, dataset, tmp_path, monkeypatch) -> None:
    power = ["train.ema={kind: power}", "train.keep_checkpoints=1"]
    monkeypatch.setattr("ncsn.training.loop.SNAPSHOTS", 3)  # one at every 53 images
    config = from_yaml(tiny, overrides=power)
    runs = [tmp_path / name for name in ("whole", "halves")]
    whole, halves = (TrainingJob(config=config, dataset=dataset, averages=str(run / "ema")) for run in runs)
    outcome = train_locally(whole, runs[0] / "checkpoints")
    train_until_killed(halves, runs[1] / "checkpoints")
    assert snapshots(halves.averages or "") == [64]
    train_locally(halves, runs[1] / "checkpoints")
    places = [run / "checkpoints" / outcome.checkpoint for run in runs]
    assert_same_tensors(*places)
    for file in ("ema_2.safetensors", *(f"../../ema/images-{seen:09d}/0.050.safetensors" for seen in (112, 160))):
        one, other = (load_file(place / file) for place in places)
        assert all(one[name].equal(other[name]) for name in one)
    assert [snapshots(str(run / "ema")) for run in runs] == [[64, 112, 160]] * 2
    built = load_checkpoint(build_average(str(places[0]), relative_width=0.07))
    assert built.images_seen == 160 and built.average is not None and len(built.average["coefficients"]) == 6


def test_another_seed_gives_other_weights_and_a_complete_run_has_nothing_left_to_do(tiny, dataset, tmp_path) -> None:
    one = tensors(train(from_yaml(tiny), dataset, tmp_path / "one"))
    other = tensors(train(from_yaml(tiny, overrides=["seed=1"]), dataset, tmp_path / "other"))
    assert not all(torch.equal(one[key], other[key]) for key in one)
    again = train_locally(TrainingJob(config=from_yaml(tiny), dataset=dataset), tmp_path / "one")
    assert again.images_seen == 160 and again.loss is None and again.checkpoint == "images-000000160"


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


def test_compiling_without_a_compiler_is_a_mistake(tiny, dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with refused("compute.compile"):
        train(from_yaml(tiny, overrides=["compute.compile=true"]), dataset, tmp_path)


def test_where_a_worker_lacks_a_compiler_none_compiles(tiny, monkeypatch, caplog) -> None:
    class One(WorkerContext):
        """Another worker lacks one."""

        def sum_over_workers(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + 1.0

    def compiled(config: Config, context: WorkerContext) -> bool:
        network = nn.Identity()
        prepare_network(network, config, context)
        return network._compiled_call_impl is not None

    config = from_yaml(tiny, overrides=["compute.use_gpu=true"])
    assert compiled(config, WorkerContext()) and caplog.messages == []
    assert not compiled(config, One()) and len(caplog.messages) == 1
    monkeypatch.setenv("PATH", "")
    assert not compiled(config, WorkerContext()) and len(caplog.messages) == 2
    assert not compiled(from_yaml(tiny), One()) and len(caplog.messages) == 2, "not on a CPU, so nothing lacks"
    twice = from_yaml(tiny, overrides=["compute.use_gpu=true", "loss={kind: ssm}"])
    assert not compiled(twice, One()) and len(caplog.messages) == 2


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


def test_gradients_are_averaged_in_the_order_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(device: str) -> list[torch.Tensor]:
        found = [torch.rand(*shape, device=device) for shape in ((4, 3, 3, 3), (6, 4, 1, 1), (5,), (3, 4))]
        return [each.contiguous(memory_format=torch.channels_last) if each.ndim == 4 else each for each in found]

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(3))
    context, found = WorkerContext(rank=0, world_size=2), gradients("cpu")
    means = [1.5 * each for each in found]
    context.average(found)
    assert all(map(torch.equal, found, means))
    with pretended_gpu() as gpu:
        given = gradients("cuda")
        gpu.calls.clear()
        context.average(given)
    assert [call.name for call in gpu.calls] == ["cat", "mul_", "div_", "_foreach_copy_"]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # of a copy of a network
def test_a_gpu_waits_once_between_reports_and_tries_convolutions_for_steps_alone(
    tiny: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_steps = "train={batch_size: 16, num_images: 48, checkpoint_every_images: 48, report_every_images: 48}"
    others = "compute={use_gpu: true, compile: false}", "noise={training: {kind: lognormal}}"
    config = from_yaml(tiny, overrides=[three_steps, *others])
    searches, waits = dict[str, bool](), list[int]()
    step, losses_at, between = loop.train_step, held_out.losses_at, loop.Training.save_between

    def searched(name: str, result: Any) -> Any:
        searches[name] = torch.backends.cudnn.benchmark
        return result

    def counted(training: loop.Training) -> None:
        gpu.calls.clear()
        between(training)
        waits.append(sum(call.waits for call in gpu.calls))

    def sample(*_: Any, **__: Any) -> None:
        raise searched("preview", InvalidValue("nobody looks at values here"))

    for place, name, value in (
        (loop, "train_step", lambda *given, **named: searched("steps", step(*given, **named))),
        (held_out, "losses_at", lambda *given, **named: searched("losses", losses_at(*given, **named))),
        *((generate, "sample", sample), (loop.Training, "save_between", counted)),
        *((monitor, "SHARE", 1), (held_out, "SHARE", 1), (held_out, "MOST_IMAGES", 4)),
        # What reads a value or the GPU's name.
        *((loop.Training, "publish", lambda _: None), (loop.Training, "_newest_checkpoint", lambda _: None)),
        (loop.Curves, "point", lambda _: {"train/loss": 1.0, "train/grad_norm_max": 1.0}),
        *((torch.cuda, "get_device_name", lambda _: ""), (loop, "machine_usage", lambda _: {})),
        (torch.backends.cudnn, "benchmark", False),
    ):
        monkeypatch.setattr(place, name, value)
    with full_float32(), pretended_gpu() as gpu:
        build.tune_cuda("cuda:0")
        job = TrainingJob(config=config, dataset=dataset, sink=Recorder())
        train_loop(job, WorkerContext("cuda:0"), CheckpointStore(str(tmp_path)))
    assert searches == {"steps": True, "preview": False, "losses": False} and set(waits) == {1}


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


class Warned(WorkerContext):
    """A machine that is about to be preempted."""

    def preempted(self) -> bool:
        return True


def test_a_checkpoint_in_time_leaves_a_point_and_the_same_weights(tiny: str, dataset: str, tmp_path: Path) -> None:
    """Saved between two reports, and the weights are those of a run that was not disturbed, to the bit."""
    config = from_yaml(tiny)
    jobs = {
        name: TrainingJob(config=config, dataset=dataset, history=str(tmp_path / name / "history.json"))
        for name in ("whole", "cut")
    }
    last = train_locally(jobs["whole"], tmp_path / "whole").checkpoint
    train_until_killed(jobs["cut"], tmp_path / "cut", at="resume-000000016", context=Warned())
    assert [path.name for path in (tmp_path / "cut").iterdir() if path.is_dir()] == ["resume-000000016"]
    train_locally(jobs["cut"], tmp_path / "cut")
    assert storage.list_names(str(tmp_path / "cut")) == ["history.json", "images-000000080", "images-000000160"]
    assert_same_tensors(*(tmp_path / name / last for name in jobs))
    one, other = (load_history(str(tmp_path / name / "history.json")) for name in ("whole", "cut"))
    assert (one.images_seen, other.images_seen) == ([32, 64, 80, 96, 128, 160], [16, 32, 64, 80, 96, 128, 160])
    for name in ("train/loss", "train/grad_norm_max"):
        np.testing.assert_array_equal(one.curve(name)[1:], other.curve(name)[2:])


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
    class Two(WorkerContext):
        """The other worker's step takes 1 second, this one's no time."""

        def sum_over_workers(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + 1.0

    monkeypatch.setattr("ncsn.training.loop.time", Clock())
    timer = StepTimer(Two(world_size=2), seconds=4.0)
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
    config = from_yaml(tiny)

    def attempt(folder: Path, lease: Lease | None = None, stop: Path = tmp_path / "stop") -> TrainOutcome:
        job = TrainingJob(config=config, dataset=dataset, lease=lease, stop=str(stop))
        return train_loop(job, WorkerContext(), CheckpointStore(str(folder)))

    stop = tmp_path / "told"
    stop.touch()
    lease = Lease(str(tmp_path / "none"), check_seconds=0)
    assert not lease.expired()
    time.sleep(0.05)
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(LeaseExpired):
        attempt(checkpoints, lease)
    assert [path.name for path in checkpoints.iterdir()] == ["resume-000000016"]
    with pytest.raises(LeaseExpired):
        attempt(checkpoints, stop=stop)
    assert [path.name for path in checkpoints.iterdir()] == ["resume-000000032"]

    assert attempt(checkpoints).images_seen == 160
    assert attempt(tmp_path / "whole").images_seen == 160
    assert_same_tensors(*(tmp_path / name / "images-000000160" for name in ("checkpoints", "whole")))


@pytest.mark.slow
def test_any_number_of_workers_follows_the_same_curve(tiny: str, dataset: str, tmp_path: Path) -> None:
    def job(folder: Path, *overrides: str) -> TrainingJob:
        folder.mkdir()
        config = from_yaml(tiny, overrides=overrides)
        return TrainingJob(config=config, dataset=dataset, history=str(folder / "history.json"))

    train_locally(job(tmp_path / "1"), tmp_path / "1" / "checkpoints")
    one = load_history(str(tmp_path / "1" / "history.json"))
    # Three have 5, 5 and 6 images, so the last one makes two passes.
    for workers, overrides in ((2, ["compute.microbatch=3"]), (3, ["compute.microbatch=5"]), (4, [])):
        folder = tmp_path / str(workers)
        torch.multiprocessing.spawn(work, (workers, job(folder, *overrides), str(folder)), nprocs=workers)
        many = load_history(str(folder / "history.json"))
        assert many.images_seen == one.images_seen
        for name in ("train/loss", "train/grad_norm_max"):
            np.testing.assert_allclose(many.curve(name), one.curve(name), rtol=1e-5)
        for name in (name for name in one.points[-1] if name.startswith("train/loss_sigma_")):
            np.testing.assert_allclose(many.curve(name), one.curve(name), rtol=1e-4)
        assert_close_tensors(*(place / "checkpoints" / "images-000000160" for place in (tmp_path / "1", folder)))


@pytest.mark.slow
def test_two_workers_learn_the_weight_of_one(tiny: str, dataset: str, tmp_path: Path) -> None:
    """At any sigma, with a weight that is learned beside the network; also where they average as with CUDA graphs."""
    config = from_yaml(
        tiny, overrides=["noise={training: {kind: lognormal}}", "loss.weighting=learned", "train.ema={kind: half_life}"]
    )
    train_locally(TrainingJob(config=config, dataset=dataset), tmp_path / "1" / "checkpoints")
    (tmp_path / "2").mkdir()
    job = TrainingJob(config=config, dataset=dataset)
    torch.multiprocessing.spawn(work, (2, job, str(tmp_path / "2")), nprocs=2)
    (tmp_path / "3").mkdir()
    torch.multiprocessing.spawn(work_in_graphs, (2, job, str(tmp_path / "3")), nprocs=2)
    one, *others = (tmp_path / name / "checkpoints" / "images-000000160" for name in "123")
    learned, *same = (
        json.loads((place / "state.json").read_text())["uncertainty"]["weight"] for place in (one, *others)
    )
    assert max(map(abs, learned)) > 1e-4
    for place, weight in zip(others, same, strict=True):
        np.testing.assert_allclose(weight, learned, rtol=1e-3, atol=1e-6)
        assert_close_tensors(one, place)


@pytest.mark.slow
def test_a_copy_that_is_torn_on_one_worker_ends_all(tiny: str, dataset: str, tmp_path: Path) -> None:
    """None waits for a worker that has ended, and what is whole in the store stays there."""
    job = TrainingJob(config=from_yaml(tiny), dataset=dataset)
    train_locally(TrainingJob(config=job.config, dataset=dataset, stop_at=80), tmp_path / "checkpoints")
    torch.multiprocessing.spawn(resume_from_a_torn_copy, (2, job, str(tmp_path)), nprocs=2)
    found = {file.name: file.read_text() for file in tmp_path.glob("mistake-*")}
    assert found == dict.fromkeys(("mistake-0", "mistake-1"), "weights.safetensors differs from its checksum")
    assert CheckpointStore(str(tmp_path / "checkpoints")).newest() == "images-000000080"
