"""A launcher of a step in another process, and a tiny experiment."""

from __future__ import annotations

import re
import subprocess
import sys

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
    backend.execute(RemoteStep(**step | {"command": tuple(step["command"])}), lambda: None)
except KeyboardInterrupt:  # as `ncsn` does; of a bare Python that has imported Ray, the exit code is 1
    sys.exit(130)
except (RemoteFailure, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class Launched(subprocess.Popen[str]):
    """A launcher and its output."""

    def __init__(self, *arguments: str, env: dict[str, str]) -> None:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        super().__init__([sys.executable, "-c", _LAUNCHER, *arguments], env=env, **pipes)
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
