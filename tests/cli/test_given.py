"""What others give is read and not obeyed: the configs of models and the records of runs, their tags and addresses."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from answering import answering
from do import claimed
from refused import refused
from served import TEXT, trained_by

from ncsn import storage
from ncsn.cli.target import TargetOptions
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.config.compute import ComputeConfig
from ncsn.config.load import NOT_OF_MODELS
from ncsn.config.schema import EvaluationConfig, TrackingConfig
from ncsn.data.format import FORMAT_VERSION, MANIFEST, load_manifest
from ncsn.model.checkpoint import INDEX, load_checkpoint, save_network, sha256
from ncsn.runs.layout import RunFolder
from ncsn.steps import address
from ncsn.steps.elsewhere import remote_step
from ncsn.steps.search import trainable
from ncsn.tracking.client import server_command, tracking_uri

IMAGE = "evil.example/backdoor:1"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCSN_IMAGE", "ours:1")
    return from_yaml(TEXT, overrides=[f"storage.root={tmp_path}/.ncsn"])


@pytest.fixture
def server() -> Iterator[tuple[str, list[str | None]]]:
    """The address of one that only listens, and the passwords that it was sent."""
    sent: list[str | None] = []
    with answering(lambda request, _: (sent.append(request.headers.get("Authorization")), (200, b"OK"))[1]) as url:
        yield url, sent


@pytest.fixture
def evil(config: Config, server: tuple[str, list[str]], tmp_path: Path) -> Config:
    """The config of somebody who wants work to go to his cluster, with his image, and to be told of it."""
    url, _ = server
    kuberay = f"{{image: '{IMAGE}', namespace: theirs}}"
    compute = f"compute={{backend: kuberay, use_gpu: true, kuberay: {kuberay}, ray_jobs: {{address: '{url}'}}}}"
    places = (f"tracking.uri={url}", f"storage.root={tmp_path}/theirs", f"export.out={tmp_path}/theirs")
    return from_yaml(to_yaml(config), overrides=[compute, *places, f"evaluation.weights={url}/x.pth"])


def test_a_model_says_nothing_of_where_work_runs_and_who_is_asked(config, evil, tmp_path, model, server) -> None:
    assert not yaml.safe_load((model / "config.yaml").read_text()).keys() & set(NOT_OF_MODELS), "nothing of it is saved"
    rewrite(model, to_yaml(evil))
    for options in (TargetOptions(), TargetOptions(backend=("compute.backend=kuberay",))):
        run = options.resolve(str(model))
        asked = ComputeConfig(backend="kuberay") if options.backend else ComputeConfig()
        assert (run.config.compute, run.config.tracking) == (asked, TrackingConfig())
        assert (run.folder.root, run.config.export.out) == (f"{tmp_path}/.ncsn", None)
        assert run.config.evaluation == EvaluationConfig()
        assert tracking_uri(run.config).startswith("sqlite:")
    assert load_checkpoint(str(model)).config.compute == ComputeConfig()
    ours = tmp_path / "ours.yaml"
    ours.write_text(to_yaml(from_yaml(to_yaml(config), overrides=["compute.num_workers=2", "storage.root=mine"])))
    run = TargetOptions(str(ours), ("compute.use_gpu=true",)).resolve(str(model))
    assert (run.config.compute.num_workers, run.config.compute.use_gpu) == (2, True)
    assert run.folder.root == f"{tmp_path}/mine" and not server[1]


def test_the_record_of_a_run_names_no_address(config, evil, server, monkeypatch) -> None:
    url, sent = server
    folder = claimed(config, "mine")
    storage.write_text(folder.config, to_yaml(evil))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    for options in (TargetOptions(run="mine"), TargetOptions(folder.config)):
        for ask in (options.resolve, lambda options=options: options.registry):
            with refused("compute.kuberay.namespace", "tracking.uri"):
                ask()
    assert TargetOptions(run="mine").resolve(asking=False).config.tracking.uri is None, "who only looks may look"
    named = ("tracking.uri=null",)
    with refused("compute.kuberay.namespace"):
        TargetOptions(run="mine", overrides=named).resolve()
    run = TargetOptions(run="mine", overrides=(*named, "compute.kuberay.namespace=ours")).resolve()
    assert (run.config.compute.backend, run.config.compute.use_gpu) == ("kuberay", True), "what is no address is kept"
    assert (run.config.compute.kuberay.image, run.config.compute.kuberay.namespace) == (None, "ours")
    assert run.folder == folder and tracking_uri(run.config).startswith("sqlite:")
    monkeypatch.delenv("NCSN_IMAGE")
    with refused("compute.kuberay.image"):
        TargetOptions(run="mine", overrides=(*named, "compute.kuberay.namespace=ours")).resolve()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ours:5000")
    here = ("compute.backend=ray-jobs", f"compute.ray_jobs.address={url}")
    run = TargetOptions(run="mine", overrides=here).resolve()
    assert tracking_uri(run.config) == "http://ours:5000" and run.config.compute.ray_jobs.address == url
    command = remote_step("sample", run, run.config, {}).command
    assert "tracking.uri=null" in command, "the driver has the record too"
    assert not sent


def test_a_run_in_a_store_that_somebody_gave_is_a_model(config, evil, tmp_path) -> None:
    folder = RunFolder(f"{tmp_path}/given", "mine")
    storage.write_text(folder.config, to_yaml(evil))
    run = TargetOptions().resolve(folder.uri)
    assert run.config.compute == ComputeConfig() and run.folder == folder
    assert tracking_uri(run.config) == f"sqlite:///{tmp_path}/.ncsn/mlflow.db", "not what is there"


@pytest.mark.parametrize(
    ("tag", "value"),
    [("ncsn.checkpoint", "../../../outside"), ("ncsn.model", "/../prod"), ("ncsn.model", ""), ("state", "../" * 8)],
)
def test_a_tag_of_mlflow_makes_no_path(tmp_path, model, monkeypatch, tag, value) -> None:
    tags = {"ncsn.checkpoint": "0123456789abcdef", "ncsn.model": "0123456789abcdef"} | {tag: value}
    version = SimpleNamespace(name="pets", version="1", tags=tags)
    monkeypatch.setattr("ncsn.tracking.promotion.resolve_version", lambda *_: version)
    monkeypatch.setattr("ncsn.tracking.client.client_at", lambda *_: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    if tag == "state":
        file = model / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset_digest": value}))
        rewrite(model, (model / "config.yaml").read_text())
    monkeypatch.setattr(address, "_fetch", lambda *_: model)
    before = {*tmp_path.rglob("*")}
    with refused("key" if tag != "state" else "models:/pets/1"):
        address.resolve("models:/pets/1", key="key", root=f"{tmp_path}/.ncsn").as_run()
    assert {*tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("evaluation.weights", "https://me:SECRET@host/x.pth"),
        ("evaluation.weights", "https://SECRET@host/x.pth"),
        ("data.root", "s3://me:SECRET@bucket/x"),
        ("tracking.uri", "postgresql://me:SECRET@host/mlflow"),
        ("storage.root", "s3://me:SECRET@bucket"),
        ("export.out", "s3://me:SECRET@bucket"),
        ("train.init_from", "s3://me:SECRET@bucket/x"),
        ("compute.ray_jobs.address", "http://me:SECRET@head:8265"),
        ("tracking.uri", "postgresql://host/mlflow?user=me&password=SECRET"),
        ("evaluation.weights", "hTTps://SECRET@host/x.pth"),
    ],
)
def test_a_password_in_an_address_is_neither_kept_nor_said(config, setting, value) -> None:
    with refused(setting) as caught:
        from_yaml(to_yaml(config), overrides=[f"{setting}={value}"])
    assert "SECRET" not in str(caught.value) + json.dumps([each.to_json() for each in caught.value.problems])


def test_an_address_with_a_user_of_a_database_has_no_password(config) -> None:
    uri = "postgresql://me@host/mlflow"
    assert from_yaml(to_yaml(config), overrides=[f"tracking.uri={uri}"]).tracking.uri == uri


def test_the_password_of_a_database_is_no_word_of_a_command(tmp_path) -> None:
    command, variables = server_command(uri := "postgresql://me:SECRET@host/mlflow")
    assert "SECRET" not in " ".join(command) and uri in variables.values()


def test_a_store_is_its_makers_alone_and_one_that_was_there_stays_as_it_is(config, tmp_path) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    claimed(config, "mine")
    (shared := tmp_path / "shared").mkdir()
    shared.chmod(0o775)
    claimed(from_yaml(to_yaml(config), overrides=[f"storage.root={shared}"]), "mine")
    assert (mode(tmp_path / ".ncsn"), mode(shared)) == (0o700, 0o775)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A saved model."""
    (folder := tmp_path / "model").mkdir()
    save_network(trained_by(0), folder)
    return folder


def rewrite(folder: Path, config: str) -> None:
    """As somebody does who knows that the files are compared with the index."""
    (folder / "config.yaml").write_text(config)
    index = json.loads((folder / INDEX).read_text())
    index["sha256"] = {name: sha256(folder / name) for name in index["sha256"]}
    (folder / INDEX).write_text(json.dumps(index))


def test_a_record_brings_no_file_of_this_machine_into_the_store(config, tmp_path) -> None:
    (tmp_path / "secret").write_text("TOPSECRET")
    root = config.storage.root
    storage.write_bytes(f"{root}/runs/mine/grid.png", b"png")
    assert storage.read_below(root, f"{root}/runs/mine/grid.png") == b"png"
    for uri in (f"{tmp_path}/secret", f"{root}/../secret", f"{root}-2/x", root):
        with refused(uri):
            storage.read_below(root, uri)


def test_what_a_search_has_found_says_nothing_of_this_side(config, evil, tmp_path) -> None:
    storage.write_text(place := f"{tmp_path}/best.yaml", to_yaml(evil))
    found = trainable(SimpleNamespace(config=place), config)
    assert found == config


def test_a_model_that_asks_for_more_memory_than_there_is_is_refused_first(model) -> None:
    config = yaml.safe_load((model / "config.yaml").read_text())
    config["network"]["widths"] = [60_000]  # 130 GB for one convolution
    rewrite(model, yaml.safe_dump(config))
    with refused(str(model)):
        load_checkpoint(str(model))


def test_a_dataset_whose_digest_is_a_path_is_none(tmp_path) -> None:
    storage.write_text(f"{tmp_path}/{MANIFEST}", json.dumps({"format_version": FORMAT_VERSION, "digest": "/home/me"}))
    with refused(str(tmp_path)):
        load_manifest(str(tmp_path))
