"""A tiny experiment, one SQLite store for all tests, and real MLflow servers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ports import free_port

from ncsn.config import Config, from_yaml
from ncsn.core.images import fit_moments
from ncsn.model import build
from ncsn.model.checkpoint import SamplingCheckpoint
from ncsn.tracking import client, mlflow_runs
from ncsn.tracking.client import client_at

EXPERIMENT = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1}
noise: {num_levels: 2, sigma_L: 0.1}
network: {kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 4, num_images: 8, checkpoint_every_images: 8, report_every_images: 4}
sampling: {num_images: 4, batch_size: 3, sampler: {kind: annealed_langevin, steps_per_level: 2, epsilon: 1.0e-4}}
evaluation: {num_splits: 2}
"""

MakeConfig = Callable[..., Config]
# MLflow's server opens its database at the first request to its API.
API = "/api/2.0/mlflow/experiments/search?max_results=1"


@pytest.fixture(autouse=True)
def _slow_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine's server may take longer to answer than one that people wait for."""
    monkeypatch.setattr(client, "PROBE_SECONDS", 60)
    monkeypatch.setattr(mlflow_runs, "TIMEOUT", 60)


def wait_for(url: str, process: subprocess.Popen[bytes], *, seconds: float = 240.0) -> None:
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


class Server:
    """A command that serves HTTP on a loopback port of its own, and can be killed and started again."""

    def __init__(self, command: list[str], *, health: str, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
        self._health = self.url + health
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # `mlflow models serve` looks for uvicorn on the PATH.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
                env=environment,
            )
        wait_for(self._health, self._process)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Killed while the block runs; whatever the block raises, it serves again after it."""
        self.kill()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Stopped while the block runs: it takes connections and says nothing."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill it and its workers, if it runs."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)
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
    """A real tracking server."""
    folder = tmp_path_factory.mktemp("server")
    database = f"sqlite:///{folder}/server.db"
    client_at(database)  # our own way to create it takes a second where the server's takes many
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += [
        "--backend-store-uri",
        database,
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    server = Server(command, health=API, folder=folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[[list[str]], Server]]:
    """Command of a tracking server -> the server, started."""
    started: list[Server] = []

    client_at(f"sqlite:///{tmp_path}/server.db")  # which a server may have named, and would take long to create

    def start(command: list[str]) -> Server:
        started.append(Server(command, health=API, folder=tmp_path))
        started[-1].start()
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def serve_model(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """URI of a model -> address of `mlflow models serve`."""
    started: list[Server] = []

    def serve(uri: str) -> str:
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--model-uri", uri]
        started.append(Server(command, health="/ping", folder=tmp_path))
        started[-1].start()
        return started[-1].url

    yield serve
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def checkpoint(config: Config) -> SamplingCheckpoint:
    return SamplingCheckpoint(
        config=config,
        network=build.network(config).eval(),
        moments=fit_moments(torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))),
        images_seen=8,
        dataset_digest="d1",
        digest="0123456789abcdef",
    )
