"""A tracking server that keeps its artifacts in an S3 store which only the server itself can reach."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
import torch
from mlflow.entities.model_registry import ModelVersion
from mlflow_server import tracking_server
from refused import refused

from ncsn.model.trained import load_trained
from ncsn.tracking import registry
from ncsn.tracking.client import TrackingError
from ncsn.tracking.mlflow_runs import step_run
from ncsn.tracking.registry import Candidate, fetch_weights


@pytest.fixture
def url(s3_root: str, tmp_path: Path) -> Iterator[str]:
    """Address of a server that advertises presigned downloads, as MLflow 3.17.2 does for every store in S3."""
    with tracking_server(tmp_path, artifacts=f"{s3_root}/mlflow") as server:
        info = requests.get(f"{server.url}/api/3.0/mlflow/server-info", timeout=30).json()
        assert info["multipart_downloads_enabled"] is True, info
        yield server.url


@pytest.fixture
def hidden_store(s3_server, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, unlike the server, finds nothing at the store's address."""
    port, connect = urlsplit(s3_server.endpoint).port, socket.socket.connect

    def refuse(self: socket.socket, address: tuple[str, int]) -> None:
        if address[1] == port:
            raise ConnectionRefusedError(f"nothing listens at {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_weights_go_up_and_down_through_the_server(url, make_config, checkpoint, hidden_store, tmp_path):
    candidate = Candidate(name="s3", checkpoint=checkpoint, card="# s3\n", files={}, metrics={}, tags={})
    with step_run(make_config(f"tracking.uri={url}"), run="s3", step="register") as tracked:
        versions = [registry.register(tracked, candidate) for _ in range(2)]
    assert [str(version.version) for version in versions] == ["1", "1"]
    fetched = load_trained(fetch_weights(url, versions[0], tmp_path), origin="the registry")
    assert fetched.config == checkpoint.config
    for name, tensor in checkpoint.network.named_parameters():
        assert torch.equal(dict(fetched.network.named_parameters())[name], tensor)


def test_a_store_that_refuses_the_server_is_named(s3_root, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    version = ModelVersion("digits", "7", 0, source="mlflow-artifacts:/1/models/m-1/artifacts")
    serving = tracking_server(tmp_path, artifacts=f"{s3_root}/mlflow")
    with serving as server, refused("models:/digits/7", error=TrackingError) as caught:
        fetch_weights(server.url, version, tmp_path)
    assert "signature" in str(caught.value)
