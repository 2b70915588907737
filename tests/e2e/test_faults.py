"""Real failures, each against the run that nothing disturbed, and runs that are stopped, of which no process stays."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from workers import assert_same_training, assert_told_once, checkpoints

from ncsn import storage
from ncsn.tracking.client import client_at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_IMAGES = 3840
EVERY = 320
OUTAGE_SECONDS = 30
SETTINGS = (f"train.num_images={NUM_IMAGES}", f"train.checkpoint_every_images={EVERY}", "train.report_every_images=32")
SETTINGS += ("train.keep_checkpoints=100", "sampling.num_images=256")


def command(step: str, run: str, *more: str, root: str | None = None) -> tuple[str, ...]:
    settings = (*SETTINGS, *((f"storage.root={root}",) if root else ()))
    return (step, "--run", run, *(part for setting in settings for part in ("--set", setting)), *more)


def reached(workplace, process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Wait until the command has come that far, still at work."""
    workplace.wait_until(lambda: condition() or process.poll() is not None, what="it has come that far", seconds=900)
    assert process.poll() is None, process.communicate()[1][-3000:]


def finished(process: subprocess.Popen[str]) -> str:
    """What a command that has to succeed prints."""
    stdout, stderr = process.communicate(timeout=1500)
    assert process.returncode == 0, stderr[-3000:]
    return stdout + stderr


@pytest.fixture(scope="module")
def whole(workplace) -> str:
    """URI of a run that nothing disturbs, trained and sampled."""
    for step in ("ingest", "train", "sample"):
        finished(workplace.start(*command(step, "whole")))
    uri = str(workplace.folder("whole"))
    assert len(checkpoints(uri)) == NUM_IMAGES // EVERY
    assert_told_once(client_at(f"sqlite:///{workplace.root}/mlflow.db"), "whole", uri)
    return uri


def training_workers(workplace) -> list[int]:
    """Process ids of the running workers."""
    return [pid for pid, command in workplace.processes().items() if command.startswith("ray::train")]


def test_a_killed_driver_and_the_same_command_again(workplace, whole: str) -> None:
    again = command("train", "driver", "--dataset", workplace.result("whole", "ingest")["uri"])
    uri = str(workplace.folder("driver"))
    process = workplace.start(*again, start_new_session=True)
    reached(workplace, process, lambda: checkpoints(uri) and training_workers(workplace))
    os.kill(process.pid, signal.SIGKILL)
    for worker in training_workers(workplace):  # until Ray ends them they would train on, perhaps to the end
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    process.communicate()
    workplace.wait_for_silence()
    assert len(checkpoints(uri)) < NUM_IMAGES // EVERY
    finished(workplace.start(*again))
    assert_same_training(whole, uri)
    assert_told_once(client_at(f"sqlite:///{workplace.root}/mlflow.db"), "driver", uri)


@contextmanager
def away(server) -> Iterator[None]:
    server.stop()
    try:
        time.sleep(OUTAGE_SECONDS)
        yield
    finally:
        server.start()


def test_the_s3_server_is_away_while_checkpoints_are_due_and_while_sampling(
    workplace, whole, s3_root, s3_server, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "cache"))
    uri = f"{s3_root}/runs/away"
    dataset = workplace.result("whole", "ingest")["uri"]
    process = workplace.start(*command("train", "away", "--dataset", dataset, root=s3_root))
    reached(workplace, process, lambda: checkpoints(uri))
    with away(s3_server):
        assert process.poll() is None, "training can neither end nor fail meanwhile"
    finished(process)
    assert_same_training(whole, uri)
    assert_told_once(client_at(f"sqlite:///{tmp_path}/mlflow.db"), "away", uri)

    process = workplace.start(*command("sample", "away", root=s3_root))
    reached(workplace, process, lambda: samples(uri))
    with away(s3_server):
        assert process.poll() is None, "sampling can neither end nor fail meanwhile"
    finished(process)
    made, expected = samples(uri), samples(whole)
    assert made.keys() == expected.keys()
    assert all(storage.read_bytes(made[name]) == storage.read_bytes(expected[name]) for name in made)


def samples(run: str) -> dict[str, str]:
    """The URI of each shard of a run, by its name below the samples."""
    folder = storage.join(run, "samples")
    paths = [entry.path for entry in storage.list_entries(folder, files=True)]
    return {path: storage.join(folder, path) for path in paths if path.endswith(".parquet")}


LONG = ("run", "--json", "--set", "train.num_images=6400000", "--set", "train.checkpoint_every_images=6400000")
# The command, which gives a busy machine more than ten seconds to save.
PATIENT = ("-c", "from ncsn import answer; from ncsn.cli import main; answer.SAVE_SECONDS = 1800.0; main()")


def trains(workplace, run: str) -> tuple[subprocess.Popen[str], int]:
    """The command once it trains, and the images that it began with."""
    progress = workplace.folder(run) / "steps/train/progress.json"
    progress.unlink(missing_ok=True)
    process = workplace.start(*LONG, "--run", run, program=PATIENT, start_new_session=True)
    seen = list[int]()

    def advances() -> bool:
        if progress.exists():
            seen.append(json.loads(progress.read_text())["done"])
        return len(set(seen)) > 1 or process.poll() is not None

    workplace.wait_until(advances, what="training has begun")
    assert process.poll() is None, process.communicate()[1]
    return process, seen[0]


def where_it_continues(workplace, process: subprocess.Popen[str], run: str) -> int:
    """The images of the checkpoint that the interrupted command left, which is its only one."""
    stdout, stderr = process.communicate(timeout=600)
    assert (process.returncode, stdout) == (130, "") and "Traceback" not in stderr, stderr
    last = stderr.splitlines()[-1]
    told = re.search(rf"^interrupted; .* image ([\d,]+) of 6,400,000; .* --run {run} .*--finish", last)
    assert told, stderr
    saved = int(told[1].replace(",", ""))
    assert storage.list_names(str(workplace.folder(run) / "checkpoints")) == [f"resume-{saved:09d}"]
    assert json.loads((workplace.folder(run) / "steps/train/attempt.json").read_text())["state"] == "KILLED"
    workplace.wait_for_silence()
    return saved


def test_after_ctrl_c_training_is_saved_and_a_second_one_ends_it_at_once(workplace) -> None:
    process, first = trains(workplace, "ctrl-c")
    assert first == 0
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    saved = where_it_continues(workplace, process, "ctrl-c")
    assert saved > 0
    process, first = trains(workplace, "ctrl-c")
    assert first >= saved
    for pid in training_workers(workplace):
        os.kill(pid, signal.SIGSTOP)  # it cannot save
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None
    assert any("interrupted: saving" in line for line in process.stderr)
    os.killpg(process.pid, signal.SIGINT)
    assert where_it_continues(workplace, process, "ctrl-c") == saved


def test_a_killed_run_ends_with_all_that_it_started(workplace) -> None:
    process, _ = trains(workplace, "killed")
    process.kill()
    process.communicate(timeout=600)
    workplace.wait_for_silence()  # Ray's agents try to reach the dead head for a minute
