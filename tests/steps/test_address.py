"""What an address of a trained network names, in every form; and a registered version, opened as a run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from do import claimed, do, recorded
from refused import refused

from ncsn import storage
from ncsn.cli.target import TargetOptions
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.data.samples import SampleSet
from ncsn.library.model import ScoreModel
from ncsn.model.checkpoint import load_checkpoint, weights_digest
from ncsn.model.generate import guide_of
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import read_finished, version_of
from ncsn.steps.address import keep_guide, load, load_guided, resolve
from ncsn.tracking import registry
from ncsn.tracking.client import SQLITE
from ncsn.tracking.mlflow_runs import step_run


@pytest.fixture(scope="module")
def trained(config: Config, save_untrained) -> RunFolder:
    """The run `mine`, whose training is done, with version 1 of the model `pets`, the champion."""
    dataset, folder = do("ingest", config, "mine").uri, claimed(config, "mine")
    checkpoint = Path(folder.checkpoints) / "images-000000008"
    checkpoint.parent.mkdir()
    save_untrained(config, dataset, checkpoint)
    recorded(folder, "train", state="FINISHED", result={"checkpoint": str(checkpoint)}, finished_at="2026-01-01")
    _register(config, str(checkpoint), "pets")
    claimed(config, "untrained")
    return folder


def _register(config: Config, checkpoint: str, name: str, **changes: object) -> None:
    found = replace(load_checkpoint(checkpoint), config=config, **changes)  # type: ignore[arg-type]
    with step_run(config, run="mine", step="register") as tracked:
        registry.register(tracked, registry.Registration(name, found, card="", files={}, metrics={}, tags={}))
        tracked.client.set_registered_model_alias(name, "champion", "1")


@pytest.fixture
def saved(trained: RunFolder, tmp_path: Path) -> str:
    """The network of the run as a saved model; beside it is a copy of its checkpoint."""
    shutil.copytree(f"{trained.checkpoints}/images-000000008", tmp_path / "copy")
    ScoreModel.load(tmp_path / "copy", device="cpu").save(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_every_address_names_the_same_network(trained: RunFolder, saved: str, tmp_path: Path) -> None:
    checkpoint = f"{trained.checkpoints}/images-000000008"
    expected = load_checkpoint(checkpoint)
    version = resolve("models:/pets/1", key="here", root=trained.root).version
    opened_as = f"pets-1-{version.tags['ncsn.model'][:8]}"
    for address, run, name in (
        ("models:/pets@champion", opened_as, "models:/pets/1"),
        ("models:/pets/1", opened_as, "models:/pets/1"),
        ("mine", "mine", checkpoint),
        (f"file://{trained.uri}/", "mine", checkpoint),
        (checkpoint, "mine", checkpoint),
        (f"{tmp_path}/copy", None, f"{tmp_path}/copy"),
        (saved, None, saved),
    ):
        place = resolve(address, key="here", root=trained.root)
        found, opened = load(place), place.as_run()
        assert place.name == name == resolve(place.address, key="here", root=trained.root).name
        assert place.digest == found.digest == expected.digest == weights_digest(found.network)
        assert (found.images_seen, found.dataset_digest) == (expected.images_seen, expected.dataset_digest)
        assert (opened.run if opened else None) == run


def test_what_names_nothing_is_refused_in_one_line(trained, saved, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = ["nothing", "No name", "untrained", "mine/checkpoints", "s3://", "http://host/x", "a\0b", ""]
    nowhere += [f"{trained.uri}/checkpoints", f"{trained.uri}/steps", str(tmp_path), f"{tmp_path}/nowhere"]
    nowhere += ["models:/", "models:/pets", "models:/pets/2", "models:/pets@best", "models:/no/1", "pets@champion"]
    for address in nowhere:
        with refused("here") as caught:
            load(resolve(address, key="here", root=trained.root))
        assert caught.value.problems[0].hint
    with refused("here"):
        resolve("models:/pets/1", key="here", root=str(tmp_path / "store"))
    assert not (tmp_path / "store").exists(), "a store without a registry gets none"
    Path(saved, "ema.safetensors").write_bytes(b"torn")
    with refused("train.init_from"):
        load(resolve(saved, key="train.init_from", root=trained.root))


def test_a_version_is_sampled_and_evaluated_as_a_run_that_nobody_trains(config: Config, trained: RunFolder) -> None:
    own = do("sample", config, "mine", checkpoint=f"{trained.checkpoints}/images-000000008")
    ours = Path(trained.root, "ours.yaml")
    ours.write_text(to_yaml(config))  # how images are evaluated is not for a model to say
    options = TargetOptions(str(ours))
    target = options.resolve("models:/pets@champion")
    folder = RunFolder(trained.root, target.name)
    assert version_of(folder) == "models:/pets/1" and version_of(trained) == ""
    result = do("sample", target.config, target.name)
    np.testing.assert_array_equal(SampleSet(result.uri, 4).read(0, 4), SampleSet(own.uri, 4).read(0, 4))
    manifest = storage.read_json(f"{result.uri}/manifest.json")
    assert manifest["model"] == "models:/pets/1" and "model" not in storage.read_json(f"{own.uri}/manifest.json")
    files = {path: path.stat().st_mtime_ns for path in Path(trained.root).rglob("*") if path.is_file()}
    again = options.resolve("models:/pets/1")
    assert again == target and do("sample", again.config, again.name) == result
    after = {path: path.stat().st_mtime_ns for path in files if "mlflow.db" not in path.name}
    assert {path for path, date in after.items() if date != files[path]} <= {Path(folder.begun)}
    measured = do("evaluate", target.config, target.name)
    assert measured.num_images == 4
    direct = do("evaluate", config, "mine", samples=own.uri, dataset=read_finished(folder, "ingest").values["uri"])
    assert measured.metrics == pytest.approx(direct.metrics)
    with refused("--run"):
        do("train", target.config, target.name, dataset=read_finished(folder, "ingest").values["uri"])


def test_a_guide_of_any_address_is_kept(config: Config, trained: RunFolder, saved: str) -> None:
    model, folder = load_checkpoint(f"{trained.checkpoints}/images-000000008"), claimed(config, "guided")
    for address in ("models:/pets/1", "mine", saved):
        auto = f"sampling.guidance={{kind: autoguidance, checkpoint: '{address}', weight: 2}}"
        guided = from_yaml(to_yaml(config), overrides=[auto])
        settled = keep_guide(guided, folder)
        assert settled.sampling.guidance.checkpoint == f"{folder.guides}/{model.digest}"
        assert keep_guide(settled, folder) == settled
        assert storage.read_json(f"{folder.guides}/{model.digest}/source.json")["source"] == "models:/pets/1"
    assert [path.name for path in Path(folder.guides).iterdir()] == [model.digest]
    packed = replace(model, config=guided, guide=model)
    shutil.rmtree(saved)
    assert keep_guide(guided, folder, packed) == guided and guide_of(packed, guided.sampling) is model
    with refused("sampling.guidance.checkpoint"):
        keep_guide(guided, folder, model)


def test_a_run_is_loaded_with_its_guide(config: Config, trained: RunFolder, save_untrained) -> None:
    auto = "sampling.guidance={kind: autoguidance, checkpoint: 'models:/pets/1', weight: 2}"
    guided = from_yaml(to_yaml(config), overrides=[auto])
    folder, dataset = claimed(guided, "with-guide"), read_finished(trained, "ingest").values["uri"]
    Path(folder.checkpoints).mkdir()
    save_untrained(guided, dataset, Path(folder.checkpoints) / "images-000000008")
    recorded(folder, "train", result={"checkpoint": f"{folder.checkpoints}/images-000000008"})
    found = load_guided(resolve("with-guide", key="here", root=trained.root), device="cpu")
    digest = resolve("mine", key="here", root=trained.root).digest
    assert found.guide is not None and weights_digest(found.guide.network) == digest
    assert guide_of(found, guided.sampling) is found.guide
    elsewhere = resolve(folder.uri, key="here", root=trained.root, registry=f"{SQLITE}/nowhere/mlflow.db")
    assert load_guided(elsewhere, device="cpu").guide is None
