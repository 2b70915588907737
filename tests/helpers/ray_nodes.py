"""A real Ray cluster of several nodes on this machine: a raylet per node, loopback only, the dashboard on, a token.

The nodes belong to a process of their own, which takes the whole cluster with it when it ends. So no test becomes a Ray
driver: it starts commands with `RayNodes.environment`, as a user would.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# For whatever starts or joins a cluster: Ray gives up its own processes after 30 or 60 s, and a busy machine is slow.
PATIENT_RAY = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
}
# A dead node is noticed within seconds, and a node that only waits for a core is left alone.
HEALTH_CHECK = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5"}


@dataclass
class RayNodes:
    """A cluster that runs while the context is open. The first node is the head."""

    folder: Path
    count: int
    cpus: int
    environment: Mapping[str, str] = field(default_factory=dict)
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    nodes: list[str] = field(default_factory=list)  # Ray's names for them
    address: str = ""
    dashboard: str = ""

    @property
    def client(self) -> dict[str, str]:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        return os.environ | dict(self.environment) | token | {"RAY_ADDRESS": self.address}

    def __enter__(self) -> RayNodes:
        self._temporary = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        environment = self.client | HEALTH_CHECK
        # Ray's job supervisor joins the newest cluster that it finds below this folder.
        environment["RAY_TMPDIR"] = self._temporary.name
        # Where the entrypoint of a job is looked up.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_worker_niceness": "0"}
        del environment["RAY_ADDRESS"]
        with (self.folder / "cluster.log").open("wb") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            self._process = subprocess.Popen([sys.executable, __file__], env=environment, cwd=self.folder, **pipes)
        try:
            for _ in range(self.count):
                self.add()
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        self._process.kill()
        self._process.wait()
        self._temporary.cleanup()

    def add(self) -> None:
        """Start one more node, and wait until it is alive."""
        assert self._process.stdin is not None and self._process.stdout is not None
        cache = {"NCSN_CACHE_DIR": str(self.folder / f"cache-{len(self.nodes)}")}  # which no other node has
        self._process.stdin.write(json.dumps({"num_cpus": self.cpus, "env_vars": cache}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the cluster's process has ended:\n{(self.folder / 'cluster.log').read_text()[-3000:]}"
        node, self.address, dashboard = json.loads(answer)
        self.dashboard = f"http://{dashboard}"
        self.nodes.append(node)

    def run(self, command: Sequence[str], *, seconds: float) -> subprocess.CompletedProcess[str]:
        where = {"env": self.client, "cwd": self.folder}
        return subprocess.run(command, **where, capture_output=True, text=True, timeout=seconds, check=False)

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """What Ray's state API says of `tasks` or `actors`, for example the `node_id` of each."""
        found: list[dict[str, Any]] = self.get(f"/api/v0/{kind}?limit=10000&detail=true")["data"]["result"]["result"]
        return found

    def get(self, path: str, *, method: str = "GET") -> Any:
        """The JSON that the dashboard has at a path."""
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.dashboard}{path}", headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)


def _serve() -> None:
    """Add a node for each line of stdin, and end with it. Ray writes to stdout as well: the answers have a copy."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from ray.cluster_utils import Cluster

    # Any free port for each server: another Ray on this machine may have taken the usual ones.
    ports = {"dashboard_port": 0, "dashboard_agent_listen_port": 0}
    head = {"include_dashboard": True, "dashboard_host": "127.0.0.1"} | ports
    cluster = Cluster()
    try:
        for line in sys.stdin:
            node, head = cluster.add_node(wait=False, **json.loads(line), **head), {}
            cluster._wait_for_node(node, timeout=300)  # `add_node` would give up after 30 s
            answers.write(json.dumps([node.node_id, cluster.address, cluster.webui_url]) + "\n")
            answers.flush()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    _serve()
