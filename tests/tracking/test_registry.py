"""One version per candidate; a server whose artifacts are in an S3 store that only the server itself can reach."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
import requests
import torch
from gated import DiesAt, Killed
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from mlflow_server import tracking_server
from refused import refused

from ncsn.config import Config, from_yaml, to_yaml
from ncsn.config.load import NOT_OF_MODELS
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork, load_checkpoint
from ncsn.tracking import registry
from ncsn.tracking.client import TrackingError
from ncsn.tracking.mlflow_runs import step_run
from ncsn.tracking.promotion import fetch_files
from ncsn.tracking.registry import Registration


def candidate(checkpoint: TrainedNetwork, name: str) -> Registration:
    files, metrics = {"grid.png": b"png"}, {"eval/a": 1.5}
    return Registration(name, checkpoint, card=f"# {name}\n", files=files, metrics=metrics, tags={})


def test_guidance_and_the_weights_of_the_guide_are_part_of_a_versions_identity(checkpoint, make_config):
    def digest(*overrides: str, guide: torch.nn.Module | None = None) -> str:
        worse = None if guide is None else replace(checkpoint, config=make_config(), network=guide)
        return candidate(replace(checkpoint, config=make_config(*overrides), guide=worse), "x").digest

    one, other = build.network(make_config()), build.network(make_config())
    next(iter(other.parameters())).data.add_(1.0)
    classes = ("data.num_classes=3", "train.label_dropout=0.1")
    auto = "sampling.guidance={kind: autoguidance, checkpoint: a, weight: 2}"
    digests = [
        digest(),
        digest(*classes, "sampling.guidance={kind: classifier_free, weight: 2.5}"),
        digest(*classes, "sampling.label=1"),
        digest(auto, guide=one),
        digest(auto, guide=other),
        digest(auto, "sampling.guidance.weight=3", guide=other),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(auto, "sampling.guidance.checkpoint=b", guide=other) == digests[4], "wherever the weights are"


def of_a_model(config: Config) -> Config:
    return from_yaml(to_yaml(config, without=NOT_OF_MODELS))


def test_runs_and_models_move_with_their_store(make_config, checkpoint, tmp_path):
    old, new = tmp_path / "old place", tmp_path / "new"
    with step_run(make_config(f"storage.root={old}"), run="moved", step="register") as before:
        known = {"tags": {"ncsn.root": str(old)}, "card": f'"{before.uri}"'}
        registry.register(before, replace(candidate(checkpoint, "moved"), **known))
        before.log_dataset("digits", digest="d1d1d1d1", uri=f"{old}/datasets/a")
        before.set_tags({"elsewhere": f"{old}-2/a"})
    old.rename(new)
    _artifact_repos_cache.clear()  # a process that had used the old place would go on to
    with step_run(make_config(f"storage.root={new}"), run="moved", step="register") as after:
        version = after.client.get_model_version("moved", "1")
        again = registry.register(after, candidate(checkpoint, "moved"))
    assert (after.run_id, after.parent_run_id) == (before.run_id, before.parent_run_id)
    assert (again.version, version.tags["ncsn.root"]) == (version.version, str(new))
    assert version.description == f'"sqlite:///{new}/mlflow.db"'
    run = after.client.get_run(after.run_id)
    assert run.data.tags["dataset.uri"] == f"{new}/datasets/a" and run.data.tags["elsewhere"] == f"{old}-2/a"
    assert json.loads(run.inputs.dataset_inputs[0].dataset.source) == {"uri": f"{new}/datasets/a"}
    assert not old.exists(), "nothing was written there"
    assert load_checkpoint(str(fetch_files(after.uri, version, tmp_path))).config == of_a_model(checkpoint.config)


def test_killed_at_any_request_and_repeated_it_is_one_version(config, checkpoint, monkeypatch):
    def write_small(folder, *args, **kwargs):
        folder.mkdir()
        (folder / "MLmodel").write_text("{}")

    requests = ("create_registered_model", "create_logged_model", "log_model_artifacts", "finalize_logged_model")
    requests += ("log_outputs", "log_batch", "create_model_version")
    monkeypatch.setattr(registry, "write_model", write_small)
    with step_run(config, run="killed", step="register") as tracked:
        for at in range(len(requests)):
            dying = replace(tracked, client=DiesAt(tracked.uri, requests, at=at))
            with pytest.raises(Killed):
                registry.register(dying, candidate(checkpoint, f"killed-register-{at}"))
            made = registry.register(tracked, candidate(checkpoint, f"killed-register-{at}"))
            (only,) = tracked.client.search_model_versions(f"name = 'killed-register-{at}'")
            assert str(only.version) == str(made.version) == "1"


def test_weights_go_up_and_down_through_the_server(s3_root, s3_server, make_config, checkpoint, tmp_path, monkeypatch):
    """This process, unlike the server, finds nothing at the store's address."""
    port, connect = urlsplit(s3_server.endpoint).port, socket.socket.connect

    def refuse(self, address):
        if address[1] == port:
            raise ConnectionRefusedError(f"nothing listens at {address}")
        connect(self, address)

    with tracking_server(tmp_path, artifacts=f"{s3_root}/mlflow") as server:
        info = requests.get(f"{server.url}/api/3.0/mlflow/server-info", timeout=30).json()
        assert info["multipart_downloads_enabled"] is True, "presigned, as MLflow 3.17.2 has them for a store in S3"
        monkeypatch.setattr(socket.socket, "connect", refuse)
        with step_run(make_config(f"tracking.uri={server.url}"), run="s3", step="register") as tracked:
            versions = [registry.register(tracked, candidate(checkpoint, "s3")) for _ in range(2)]
        assert [str(version.version) for version in versions] == ["1", "1"]
        (output,) = tracked.client.get_run(tracked.run_id).outputs.model_outputs
        logged = tracked.client.get_logged_model(output.model_id)
        assert [(metric.key, metric.value) for metric in logged.metrics] == [("eval/a", 1.5)]
        assert logged.status == "READY"
        fetched = load_checkpoint(str(fetch_files(server.url, versions[0], tmp_path)))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with refused("models:/s3/1", error=TrackingError):  # the server is gone
        fetch_files(server.url, versions[0], tmp_path)
    assert fetched.config == of_a_model(checkpoint.config)
    for name, tensor in checkpoint.network.named_parameters():
        assert torch.equal(dict(fetched.network.named_parameters())[name], tensor)
