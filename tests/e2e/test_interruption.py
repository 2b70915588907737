"""A run that is stopped leaves no process behind, and the same command goes on where it was."""

from __future__ import annotations

import json
import os
import signal

import pytest

RUN = "stopped"
SETTINGS = ("train.num_images=19200", "train.checkpoint_every_images=1920", "train.keep_checkpoints=100")
LONG = ("run", "--run", RUN, "--json", *(part for setting in SETTINGS for part in ("--set", setting)))


def checkpoints(workplace) -> dict[str, int]:
    """Name of each checkpoint -> when it was written."""
    folders = workplace.folder(RUN).glob("checkpoints/images-*")
    return {path.name: path.stat().st_mtime_ns for path in sorted(folders)}


def stop(workplace, *, when, what: str, by: signal.Signals) -> tuple[int, str]:
    """Start the run, stop it when the condition holds, and wait for its processes; exit code and stderr."""
    process = workplace.start(*LONG, start_new_session=True)
    workplace.wait_until(lambda: when() or process.poll() is not None, what=what)
    assert process.poll() is None, process.communicate()[1]
    assert any("raylet" in command for command in workplace.processes().values())
    os.kill(process.pid, by)
    stdout, stderr = process.communicate(timeout=600)
    assert stdout == ""
    assert "Traceback" not in stderr
    workplace.wait_for_silence()
    return process.returncode, stderr


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="ctrl-c"),
        pytest.param(signal.SIGTERM, 143, id="sigterm"),
        # Ray's agents try to reach the dead head for a minute.
        pytest.param(signal.SIGKILL, -signal.SIGKILL, id="sigkill", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_ends_with_all_that_it_started(workplace, number: signal.Signals, code: int) -> None:
    def works() -> bool:
        return any("raylet" in command for command in workplace.processes().values())

    returned, stderr = stop(workplace, when=works, what="Ray has started", by=number)
    assert returned == code, stderr
    assert stderr.splitlines()[-1].startswith("interrupted; ") == (number == signal.SIGINT)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_is_resumed(workplace) -> None:
    returned, _ = stop(
        workplace, when=lambda: checkpoints(workplace), what="training saves a checkpoint", by=signal.SIGKILL
    )
    assert returned == -signal.SIGKILL
    saved = checkpoints(workplace)
    assert "images-000019200" not in saved

    done = workplace.run(*LONG)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"]["train"]["images_seen"] == 19200
    assert checkpoints(workplace).items() > saved.items(), "trained again what was there"
