"""Settings of a process before its heavy imports, seen from inside such a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def _said(code: str, **variables: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | variables, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def test_garbage_is_collected_less_often_and_not_at_exit() -> None:
    said = _said(
        "import atexit, gc\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000))\n"
        "from ncsn.environment import reduce_gc\n"
        "reduce_gc()\n"
        "print(gc.get_threshold()[0], gc.isenabled())"
    )
    assert said.split() == ["50000", "True", "True"]


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
    ids=["by default", "as the user counts", "by the user's policy"],
)
def test_torch_waits_for_its_threads_as_long_as_is_set(given: dict[str, str], spins: str) -> None:
    said = _said("import ncsn.distributed, torch", OMP_DISPLAY_ENV="VERBOSE", **given)
    assert f"GOMP_SPINCOUNT = '{spins}'" in said
