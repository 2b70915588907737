"""A Ray job says in Ray's own record which step it is, also in a cluster that another process has started."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, subprocess, sys
from ncsn.config import from_yaml
from ncsn.distributed.cluster import ray_cluster

config, step = from_yaml(sys.argv[1]), sys.argv[2]
with ray_cluster(config, metadata={"ncsn.step": step}):
    if step == "first":
        subprocess.run([sys.executable, *sys.orig_argv[1:-1], "second"], check=True)
        from ray._private.worker import global_worker

        jobs = global_worker.gcs_client.get_all_job_info().values()
        print(json.dumps([dict(job.config.metadata) for job in jobs]))
"""


@pytest.mark.slow
def test_a_driver_names_its_step_on_its_own_cluster_and_on_one_that_it_joins(tiny: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", SCRIPT, tiny, "first"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    named = json.loads(done.stdout.splitlines()[-1])
    assert sorted(job["ncsn.step"] for job in named) == ["first", "second"]
