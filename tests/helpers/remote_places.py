"""Steps on a backend, as a launcher in another process sees them, and a real Ray head for them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_nodes import RayNodes
from tcp_proxy import TcpProxy

TINY = """
name: tiny
data: {{source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3, max_images: 128}}
noise: {{num_levels: 4}}
network: {{kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}}
train: {{batch_size: 32, num_images: 320, ema: {{kind: decay, per_step: 0.9}},
  checkpoint_every_images: 160, report_every_images: 160}}
sampling: {{num_images: 8, batch_size: 8, sampler: {{kind: annealed_langevin, steps_per_level: 1}}}}
evaluation: {{classifier_epochs: 1, num_splits: 2}}
storage: {{root: "{root}"}}
"""

_LAUNCHER = """
import json, sys
from ncsn.config.compute import ComputeConfig
from ncsn.remote import backend as common, kuberay, open_backend
from ncsn.remote.backend import RemoteFailure, RemoteStep
from ncsn.storage import heartbeat
compute, step = json.loads(sys.argv[1]), json.loads(sys.argv[2])
backend = open_backend(ComputeConfig.model_validate(compute))
heartbeat.RENEW_SECONDS = 0.2
kuberay.POLL_SECONDS = common._LOG_SECONDS = 0.1
kuberay.LOOK_SECONDS = (0.1, 0.1)
kuberay._AT_ONCE, common._LAST_READ_SECONDS = (60.0, 60.0), 120.0  # this machine may be slower than a cluster
try:
    if step is None:
        print(json.dumps(backend.stop(run=sys.argv[3], kfp_run=None)))
    else:
        backend.execute(RemoteStep(**step | {"command": tuple(step["command"])}))
except KeyboardInterrupt:  # as `ncsn` does; of a bare Python that has imported Ray, the exit code is 1
    sys.exit(130)
except (RemoteFailure, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class Launched(subprocess.Popen[str]):
    """A launcher and its output."""

    def __init__(self, *arguments: str, env: dict[str, str]) -> None:
        super().__init__(
            [sys.executable, "-c", _LAUNCHER, *arguments],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []

    def until(self, line: str) -> None:
        """Wait until it says a line that the pattern matches."""
        assert self.stderr is not None
        for each in self.stderr:
            self.said.append(each.rstrip("\n"))
            if re.fullmatch(line, self.said[-1]):
                return
        raise AssertionError(f"it ended without {line!r}: {self.said}")

    def ended(self) -> int:
        _, rest = self.communicate(timeout=240)
        self.said += rest.splitlines()
        return self.returncode


@dataclass
class RayHead:
    """A job server behind a proxy that can be cut, and steps whose command is Python code."""

    folder: Path
    nodes: RayNodes
    proxy: TcpProxy

    @property
    def compute(self) -> str:
        return json.dumps({"backend": "ray-jobs", "ray_jobs": {"address": self.proxy.url}})

    def launch(self, run: str, code: str, **changes: Any) -> Launched:
        step = {"root": str(self.folder), "run": run, "step": "train", "command": ("python", "-c", code)}
        return Launched(self.compute, json.dumps(step | changes), env=self.environment)

    def stop(self, run: str) -> list[str]:
        stopping = Launched(self.compute, "null", run, env=self.environment)
        out, err = stopping.communicate(timeout=240)
        assert stopping.returncode == 0, err
        names: list[str] = json.loads(out)
        return names

    def step_folder(self, run: str) -> Path:
        return self.folder / "runs" / run / "steps" / "train"

    def log(self, run: str) -> str:
        return (self.step_folder(run) / "log.txt").read_text()

    @property
    def environment(self) -> dict[str, str]:
        """As a user has it: the token, and no mode and no address."""
        return {name: text for name, text in self.nodes.client.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}

    def ncsn(self, *args: str, code: str = "") -> subprocess.CompletedProcess[str]:
        """The command as a user has it."""
        command = [sys.executable, *(["-c", code] if code else ["-m", "ncsn"]), *args]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def of(self, run: str) -> list[dict[str, Any]]:
        mine = [job for job in self.nodes.get("/api/jobs/") if (job["metadata"] or {}).get("ncsn.run") == run]
        return sorted(mine, key=lambda job: job["start_time"])

    def running(self, run: str) -> list[str]:
        return [job["submission_id"] for job in self.of(run) if job["status"] in ("PENDING", "RUNNING")]

    @contextmanager
    def outage(self) -> Iterator[None]:
        self.proxy.cut()
        yield
        self.proxy.restore()

    def lose(self, run: str) -> None:
        """Ray forgets a job that has ended only, so the launcher does not see it end."""
        (name,) = self.running(run)
        with self.outage():
            self.nodes.get(f"/api/jobs/{name}/stop", method="POST")
            while self.running(run):
                time.sleep(0.2)
            time.sleep(3)  # Ray's monitor of the job must have ended, else it writes a status once more
            self.nodes.get(f"/api/jobs/{name}", method="DELETE")
