"""MLflow's servers for real, on loopback: they answer, can be killed, and start again at the same address."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from ports import free_port

from ncsn.tracking.client import client_at

MLFLOW = [sys.executable, "-m", "mlflow"]
API = "/api/2.0/mlflow/experiments/search?max_results=1"  # at whose first request its server opens its database


class Server:
    """A command that serves HTTP at a free port while the context is open."""

    def __init__(self, command: list[str], *, folder: Path, health: str = API) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [*command, "--host", "127.0.0.1", "--port", str(port)]
        self._health, self._folder = self.url + health, folder

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()

    def start(self) -> None:
        # `mlflow models serve` looks for uvicorn on the PATH.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True, env=environment
            )
        give_up = time.monotonic() + 240
        try:
            while not self._answers():
                assert self._process.poll() is None, f"{self._command} ended with {self._process.returncode}"
                assert time.monotonic() < give_up, f"{self._health} did not answer within 240 s"
                time.sleep(0.2)
        except BaseException:
            self.kill()
            raise

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(self._health, timeout=5):
            return True
        return False

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
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)


def tracking_server(folder: Path, *, database: str = "", artifacts: str = "") -> Server:
    """A tracking server. Without a database it has `server.db` in the folder, and its artifacts are there as well."""
    if not database:
        database = f"sqlite:///{folder}/server.db"
        client_at(database)  # our own way to create it takes a second where the server's takes many
    places = ["--backend-store-uri", database, "--artifacts-destination", artifacts or f"{folder}/artifacts"]
    return Server([*MLFLOW, "server", "--workers", "1", *places], folder=folder)
