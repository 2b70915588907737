"""Fault injection without Ray: how faults are written, that they are real, happen once, and change no result."""

from __future__ import annotations

import errno
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from clock import Clock
from local_training import assert_same_tensors, train_locally
from refused import refused

from ncsn import storage
from ncsn.config import Config, from_yaml
from ncsn.distributed.faults import FORMS, Fault, FaultInjector, parse, parse_faults
from ncsn.runs.folder import RunFolder
from ncsn.runs.history import load_history
from ncsn.storage import retry
from ncsn.training.loop import DivergedError, TrainingJob, TrainOutcome

LAST = "images-000000160"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill-worker@images=5000", Fault("kill-worker", 5000)),
        ("nan@images=0", Fault("nan", 0)),
        ("store-down@images=10:30s", Fault("store-down", 10, seconds=30)),
        ("tracking-down@images=10:1.5m", Fault("tracking-down", 10, seconds=90)),
        ("store-errors@images=10:0.25", Fault("store-errors", 10, seconds=60, share=0.25)),
    ],
)
def test_a_fault_is_read(text: str, fault: Fault) -> None:
    assert parse(text, step="train") == fault


@pytest.mark.parametrize(
    ("text", "step", "form"),
    [
        ("kill@images=3", "train", "kill-worker@images=N"),
        ("kill-worker@image=3", "train", "kill-worker@images=N"),
        ("kill-worker@images=-3", "train", "kill-worker@images=N"),
        ("kill-worker@images=3:4s", "train", "kill-worker@images=N"),
        ("nan@images=3", "sample", "store-down@images=N:TIME"),
        ("store-down@images=3", "train", "store-down@images=N:TIME"),
        ("store-down@images=3:30", "train", "store-down@images=N:TIME"),
        ("store-errors@images=3:1.5", "train", "store-errors@images=N:SHARE"),
        ("store-errors@images=3:0.0", "train", "store-errors@images=N:SHARE"),
    ],
)
def test_what_is_no_fault_is_refused_in_one_line(text: str, step: str, form: str) -> None:
    with refused("--inject") as caught:
        parse(text, step=step)
    (problem,) = caught.value.problems
    assert problem.value == text
    assert form in str(problem)


def test_faults_that_cannot_happen_are_refused() -> None:
    assert parse_faults([], step="train", folder=RunFolder("/store", "mine")).faults == ()
    with refused("--inject"):
        parse_faults(["nan@images=3", "nan@images=3"], step="train", folder=RunFolder("s3://b", "mine"))
    with refused("--inject") as caught:
        parse_faults(["store-down@images=3:1s"], step="train", folder=RunFolder("/store", "mine"))
    assert "storage.root" in caught.value.problems[0].hint
    assert all(
        parse(form.replace("N", "1").replace("TIME", "1s").replace("SHARE", "1"), step="train")
        for form in FORMS.values()
    )


def run(folder: Path, config: Config, dataset: str, *inject: str) -> TrainOutcome:
    job = TrainingJob(
        config=config,
        dataset=dataset,
        history=str(folder / "history.json"),
        hooks=parse_faults(inject, step="train", folder=RunFolder(str(folder), "mine")),
    )
    return train_locally(job, folder / "checkpoints")


def assert_same(one: Path, other: Path) -> None:
    """Weights, EMA, optimizer and curves are equal to the last bit."""
    assert_same_tensors(one / "checkpoints" / LAST, other / "checkpoints" / LAST)
    assert curves(one) == curves(other)


def curves(folder: Path) -> list[tuple[int, dict[str, float]]]:
    history = load_history(str(folder / "history.json"))
    points = [{name: value for name, value in point.items() if "per_second" not in name} for point in history.points]
    return list(zip(history.images_seen, points, strict=True))


@pytest.fixture(scope="module")
def whole(tiny: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, from_yaml(tiny), dataset)
    assert [seen for seen, _ in curves(folder)] == [32, 64, 80, 96, 128, 160]
    return folder


def test_a_nan_ends_training_and_is_forgotten_by_the_same_command(
    whole: Path, tiny: str, dataset: str, tmp_path: Path
) -> None:
    config = from_yaml(tiny)
    with refused("optimizer.learning_rate", error=DivergedError) as caught:
        run(tmp_path, config, dataset, "nan@images=100")
    assert all(fact in str(caught.value) for fact in ("loss nan", "images_seen = 128", "images-000000080"))
    run(tmp_path, config, dataset, "nan@images=100")
    assert_same(whole, tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before(whole: Path, tiny: str, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as full:
        run(tmp_path, from_yaml(tiny), dataset, "disk-full@images=100")
    assert full.value.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["images-000000080"]
    run(tmp_path, from_yaml(tiny), dataset, "disk-full@images=100")
    assert_same(whole, tmp_path)


def test_a_kill_is_a_kill_of_the_worker_that_would_draw_the_image(tmp_path: Path) -> None:
    code = """
import os, sys
from ncsn.distributed.faults import parse_faults
from ncsn.runs.folder import RunFolder
faults = parse_faults(["kill-worker@images=24"], step="train", folder=RunFolder(sys.argv[1], "mine"))
for rank in (0, 1, 1):
    worker = os.fork()
    if not worker:
        for batch in (range(0, 16), range(16, 32)):
            faults.trigger(batch, share=range(8 * rank, 8 * rank + 8), rank=rank)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", str(-signal.SIGKILL), "0"], "not the other worker, and not twice"


@pytest.mark.parametrize("name", ["weights.safetensors", "checkpoint.json"])
def test_the_checkpoint_before_a_damaged_one_is_used_and_named(
    whole: Path, tiny: str, dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    run(tmp_path, from_yaml(tiny), dataset)
    damaged = tmp_path / "checkpoints" / LAST / name
    damaged.write_bytes(damaged.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        run(tmp_path, from_yaml(tiny), dataset)
    assert LAST in caplog.text and name in caplog.text
    assert_same(whole, tmp_path)


def test_a_damaged_checkpoint_in_a_bucket_is_made_again(
    whole: Path, tiny: str, dataset: str, s3_root: str, caplog
) -> None:
    job = TrainingJob(config=from_yaml(tiny), dataset=dataset)
    train_locally(job, f"{s3_root}/checkpoints")
    for name in ("images-000000080", LAST):
        storage.write_bytes(f"{s3_root}/checkpoints/{name}/ema.safetensors", b"half")
    train_locally(job, f"{s3_root}/checkpoints")
    assert caplog.text.count("ema.safetensors") == 2
    with storage.local_copy(f"{s3_root}/checkpoints/{LAST}") as folder:
        made = (folder / "ema.safetensors").read_bytes()
    assert made == (whole / "checkpoints" / LAST / "ema.safetensors").read_bytes()


def test_outages_are_shared_by_the_processes_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(retry, "time", Clock())
    faults = FaultInjector((Fault("tracking-down", 3, seconds=60),), RunFolder(str(tmp_path), "mine"))
    retry.simulate_outage("tracking")
    with faults.outages_shared():
        faults.trigger(range(8), share=range(4, 8), rank=1)
        retry.simulate_outage("tracking")
        faults.trigger(range(8), share=range(4), rank=0)
        retry.simulate_outage("store")
        with pytest.raises(ConnectionRefusedError, match="60 s"):
            retry.simulate_outage("tracking")
    retry.simulate_outage("tracking")
