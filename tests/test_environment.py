"""Settings of a process before its heavy imports, seen from inside such a process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

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


@pytest.mark.parametrize("loaded", ["import triton._C.libtriton", "sys.modules['triton'] = types.ModuleType('triton')"])
def test_objects_of_triton_are_collected_at_exit(loaded: str) -> None:
    """Otherwise they outlive the interpreter, and nanobind prints each of them."""
    if loaded.startswith("import") and find_spec("triton") is None:
        loaded = ""  # a build of torch without it, which has nothing to say
    said = _said(
        "import atexit, gc, sys, types\n"
        "from ncsn.environment import reduce_gc\n"
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > 1000))\n"
        "reduce_gc()\n" + loaded
    )
    assert said.split() == ["frozen", "False" if loaded else "True"]


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
    ids=["by default", "as the user counts", "by the user's policy"],
)
def test_torch_waits_for_its_threads_as_long_as_is_set(given: dict[str, str], spins: str) -> None:
    said = _said("import ncsn.distributed, torch", OMP_DISPLAY_ENV="VERBOSE", **given)
    assert f"GOMP_SPINCOUNT = '{spins}'" in said
