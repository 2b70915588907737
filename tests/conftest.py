"""Shared by all tests: servers listen on loopback only, no telemetry, and a cache for the session."""

from __future__ import annotations

import errno
import os
import resource
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from filelock import FileLock
from ray_nodes import PATIENT_RAY

if TYPE_CHECKING:
    from kfp_api import KfpServer
    from playwright.sync_api import Browser
    from rayjobs import Emulation
    from s3_server import S3Server

# Set before torch, ray or mlflow is imported, and inherited by the processes that tests start.
os.environ.update(
    PATIENT_RAY,
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # keeps all of Ray's listeners on 127.0.0.1
    RAY_USAGE_STATS_ENABLED="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="1",
    MPLBACKEND="Agg",
    GOMP_SPINCOUNT="2000",  # as the processes of ncsn have it
    OMP_NUM_THREADS="1",  # over tensors as small as those of tests, threads only wait for each other
)
for _inherited in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "NCSN_CACHE_DIR"):
    os.environ.pop(_inherited, None)


# A background job of a shell ignores SIGINT, and so would every command that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that wait longest, so that the short ones run beside them, and give them time."""
    longest = ("e2e", "distributed", "remote", "kubeflow", "steps", "tracking")

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return longest.index(folder) if folder in longest else len(longest)

    items.sort(key=place)
    for item in items:
        if place(item) < len(longest) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))  # seconds, with the servers and clusters that it starts


@pytest.fixture(scope="session", autouse=True)
def _cache_dir() -> Iterator[None]:
    """A cache for the session, instead of the user's."""
    with tempfile.TemporaryDirectory(prefix="ncsn-cache-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCSN_CACHE_DIR", folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_migration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow's fifty migrations make one database for all processes of the tests, and the others are copies of it."""
    from ncsn import storage
    from ncsn.tracking import client

    folder, create = tmp_path_factory.getbasetemp(), client._create_database
    first = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "migrated" / "mlflow.db"

    def copy(path: Path) -> None:
        if not path.exists():
            create(first)
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock")):
                if not path.exists():
                    with storage.local_file(path) as temporary:
                        shutil.copyfile(first, temporary)
        create(path)  # follows the move

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "_create_database", copy)
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One S3 server for the session, with one bucket: the server reserves seven volumes of the disk for each."""
    from s3_server import running_s3_server

    with running_s3_server() as server:
        yield server


@pytest.fixture
def s3_root(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of an empty folder of the session's S3 server, whose address is in the environment."""
    from s3_server import BUCKET

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    _forget_s3_clients()
    yield f"s3://{BUCKET}/{secrets.token_hex(6)}"
    _forget_s3_clients()


@pytest.fixture
def kfp_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """A Kubeflow Pipelines API without users, whose address is not in the environment."""
    for name in ("KF_PIPELINES_ENDPOINT", "NCSN_KFP_TOKEN", "NCSN_KFP_COOKIE", "KF_PIPELINES_SA_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    from kfp_api import KfpServer

    with KfpServer() as server:
        yield server


@pytest.fixture
def emulation(tmp_path: Path) -> Iterator[Emulation]:
    """An emulated Kubernetes API that the kubeconfig of the environment names, and a step to run on it."""
    from rayjobs import emulated

    with emulated(tmp_path) as emulation:
        yield emulation


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Wait until a condition holds; fail if it never does."""

    def wait(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
        ends = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < ends, f"not in time: {what}"
            time.sleep(0.02)

    return wait


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium, for one module: its event loop runs in this thread, where tests of others start their own."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(names)} is installed: apt-get install chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)  # milliseconds, for a busy machine
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root; the page under test is ours.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


class SmallDisk(NamedTuple):
    """A folder with room for 2 MiB, and the error number of a write that exceeds it."""

    folder: Path
    full: int


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of 2 MiB if the user may mount one, else a limit of 2 MiB for each written file."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        yield SmallDisk(folder, errno.ENOSPC)
        subprocess.run(["umount", str(folder)], check=True)
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, limits[1]))
        yield SmallDisk(folder, errno.EFBIG)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _forget_s3_clients() -> None:
    from ncsn.storage import s3

    s3.bucket_filesystem.cache_clear()
    s3.client.cache_clear()
