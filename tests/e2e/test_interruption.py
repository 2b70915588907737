"""A run that is stopped saves its training, says where it continues, and leaves no process behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess

import pytest

from ncsn import storage

LONG = ("run", "--json", "--set", "train.num_images=6400000", "--set", "train.checkpoint_every_images=6400000")
# The command, which gives a busy machine more than ten seconds to save.
PATIENT = ("-c", "from ncsn import answer; from ncsn.cli import main; answer.SAVE_SECONDS = 1800.0; main()")


def trains(workplace, *args: str) -> tuple[subprocess.Popen[str], int]:
    """The command once it trains, and the images that it began with."""
    progress = workplace.folder(args[-1]) / "steps/train/progress.json"
    progress.unlink(missing_ok=True)
    process = workplace.start(*LONG, *args, program=PATIENT, start_new_session=True)
    seen = list[int]()

    def advances() -> bool:
        if progress.exists():
            seen.append(json.loads(progress.read_text())["done"])
        return len(set(seen)) > 1 or process.poll() is not None

    workplace.wait_until(advances, what="training has begun")
    assert process.poll() is None, process.communicate()[1]
    return process, seen[0]


def where_it_continues(workplace, process: subprocess.Popen[str], run: str, code: int) -> int:
    """The images of the checkpoint that the ended command left, which is its only one."""
    stdout, stderr = process.communicate(timeout=600)
    assert (process.returncode, stdout) == (code, ""), stderr
    assert "Traceback" not in stderr
    told = re.search(
        rf"^interrupted; .* image ([\d,]+) of 6,400,000; .* --run {run} .*--finish", stderr.splitlines()[-1]
    )
    assert told, stderr
    saved = int(told[1].replace(",", ""))
    assert storage.list_names(str(workplace.folder(run) / "checkpoints")) == [f"resume-{saved:09d}"]
    assert json.loads((workplace.folder(run) / "steps/train/step.json").read_text())["state"] == "KILLED"
    workplace.wait_for_silence()
    return saved


@pytest.mark.slow
def test_after_ctrl_c_training_is_saved_and_a_second_one_ends_it_at_once(workplace) -> None:
    process, first = trains(workplace, "--run", "ctrl-c")
    assert first == 0
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    saved = where_it_continues(workplace, process, "ctrl-c", 130)
    assert saved > 0

    process, first = trains(workplace, "--run", "ctrl-c")
    assert first >= saved
    for pid, command in workplace.processes().items():
        if command.startswith("ray::train"):
            os.kill(pid, signal.SIGSTOP)  # it cannot save
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None
    assert any("interrupted: saving" in line for line in process.stderr)
    os.killpg(process.pid, signal.SIGINT)
    assert where_it_continues(workplace, process, "ctrl-c", 130) == saved


@pytest.mark.slow
def test_a_killed_run_ends_with_all_that_it_started(workplace) -> None:
    process, _ = trains(workplace, "--run", "killed")
    process.kill()
    process.communicate(timeout=600)
    workplace.wait_for_silence()  # Ray's agents try to reach the dead head for a minute
