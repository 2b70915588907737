"""A run that is stopped leaves no process behind."""

from __future__ import annotations

import os
import signal

import pytest

LONG = ("run", "--run", "stopped", "--json", "--set", "train.num_images=19200")


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
    process = workplace.start(*LONG, start_new_session=True)

    def works() -> bool:
        return any("raylet" in command for command in workplace.processes().values())

    workplace.wait_until(lambda: works() or process.poll() is not None, what="Ray has started")
    assert process.poll() is None, process.communicate()[1]
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=600)
    assert (process.returncode, stdout) == (code, ""), stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("interrupted; ") == (number == signal.SIGINT)
    workplace.wait_for_silence()
