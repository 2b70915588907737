"""Settings of a process before its heavy imports, seen from inside such a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 1000))
from ncsn.process import reduce_gc
reduce_gc()
print(gc.get_threshold()[0], gc.isenabled())
import ncsn.distributed, torch
"""


@pytest.mark.parametrize(("given", "spins"), [({}, "2000"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")])
def test_garbage_is_collected_less_often_and_threads_spin_as_long_as_is_set(given: dict[str, str], spins: str) -> None:
    environment = os.environ | {"OMP_DISPLAY_ENV": "VERBOSE"} | given
    del environment["GOMP_SPINCOUNT"]  # of tests/conftest.py
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["50000", "True", "True"]
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
