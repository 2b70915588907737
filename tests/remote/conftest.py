"""A Ray cluster for all tests, and what a launcher in this process says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray_nodes import RayNodes
from s3_server import S3Server

from ncsn.remote import backend, kuberay, pods


@pytest.fixture(scope="session")
def ray_head(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """One Ray cluster with a token and a dashboard, whose processes have an S3 store and a tracking database."""
    folder = tmp_path_factory.mktemp("head")
    database = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    with RayNodes(folder, count=1, cpus=2, environment=s3_server.environment | database) as nodes:
        yield nodes


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a RayJob's launcher in this process says, as it says it: capsys may lose what is said while it is read."""
    lines: list[str] = []
    for module in (backend, kuberay, pods):
        monkeypatch.setattr(module, "say", lambda line, **_: lines.append(line))
    return lines
