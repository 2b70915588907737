"""A tiny experiment, one SQLite store for all tests, and one real MLflow server that can be stopped and started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ncsn import build
from ncsn.checkpoint import SamplingCheckpoint
from ncsn.config import Config, from_yaml

EXPERIMENT = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1}
noise: {num_levels: 2, sigma_L: 0.1}
network: {kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 4, num_images: 8, checkpoint_every_images: 8, report_every_images: 4}
sampling: {num_images: 4, batch_size: 3, sampler: {kind: annealed_langevin, steps_per_level: 2, epsilon: 1.0e-4}}
"""

MakeConfig = Callable[..., Config]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], *, seconds: float = 120.0) -> None:
    """Until `url` answers."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"{url} did not answer within {seconds} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a server that was started with `start_new_session`, and the workers in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


class Server:
    """`mlflow server` on loopback with a SQLite file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        wait_for(f"{self.url}/health", self._process)

    def stop(self) -> None:
        """Stop it, if it runs."""
        if self._process is not None:
            stop(self._process)
            self._process = None


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of most tests: they use run names of their own and share the database, which takes long to create."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def make_config(root: Path) -> MakeConfig:
    def make(*overrides: str) -> Config:
        return from_yaml(EXPERIMENT, overrides=[f"storage.root={root}", *overrides])

    return make


@pytest.fixture(scope="session")
def config(make_config: MakeConfig) -> Config:
    return make_config()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def checkpoint(config: Config) -> SamplingCheckpoint:
    return SamplingCheckpoint(
        config=config,
        network=build.network(config).eval(),
        images_seen=8,
        dataset_digest="d1",
        digest="0123456789abcdef",
    )
