"""A cluster that somebody else started may still grow: nodes are waited for, and their absence is no user's mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ray_nodes import RayNodes

pytestmark = pytest.mark.timeout(240)

DRIVER = """
import sys
from ncsn.config import from_yaml
from ncsn.distributed import cluster as local_cluster
local_cluster.JOIN_SECONDS = float(sys.argv[2])
with local_cluster.ray_cluster(from_yaml(sys.argv[1])) as address:
    print("joined", flush=True)
    try:
        local_cluster.require_resources(from_yaml(sys.argv[1]))
    except RuntimeError as error:
        print("too few:", error)
    else:
        print("enough")
"""


def drive(cluster: RayNodes, config: str, *, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, config, str(seconds)]
    return subprocess.Popen(command, env=cluster.client, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_worker_that_joins_late_is_waited_for(tiny: str, tmp_path: Path) -> None:
    """As on Kubernetes after the loss of the head: the driver runs before the worker is back."""
    config = tiny.replace("num_workers: 1", "num_workers: 2")
    assert "num_workers: 2" in config
    with RayNodes(tmp_path, count=1, cpus=1) as cluster:
        told, _ = drive(cluster, config, seconds=1).communicate(timeout=60)
        assert "too few: compute.num_workers = 2: " in told
        driver = drive(cluster, config, seconds=120)
        assert driver.stdout is not None
        assert driver.stdout.readline() == "joined\n"
        cluster.add()
        told, said = driver.communicate(timeout=120)
        assert told == "enough\n", said
