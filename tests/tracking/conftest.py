"""A tiny experiment, one SQLite store for all tests, and real MLflow servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from experiments import SHORT, tiny
from mlflow_server import Server, tracking_server

from ncsn.config import Config
from ncsn.core.images import fit_moments
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.tracking import client

MakeConfig = Callable[..., Config]


@pytest.fixture(autouse=True)
def _slow_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine's server may take longer to answer than one that people wait for."""
    monkeypatch.setattr(client, "PROBE_SECONDS", 60)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of most tests: they use run names of their own and share the database, which takes long to create."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def make_config(root: Path) -> MakeConfig:
    def make(*overrides: str) -> Config:
        return tiny(root, *SHORT, "sampling.batch_size=3", *overrides)

    return make


@pytest.fixture(scope="session")
def config(make_config: MakeConfig) -> Config:
    return make_config()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real tracking server."""
    with tracking_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def checkpoint(config: Config) -> TrainedNetwork:
    return TrainedNetwork(
        config=config,
        network=build.network(config).eval(),
        moments=fit_moments(torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))),
        images_seen=8,
        dataset_digest="d1d1d1d1",
        digest="0123456789abcdef",
    )
