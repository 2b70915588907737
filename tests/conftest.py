"""What every test shares: nothing listens beyond loopback, nothing reports home, and caches are the session's own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
