"""Which experiment and which run the options name."""

from __future__ import annotations

from pathlib import Path

import pytest
from refused import refused

from ncsn import storage
from ncsn.cli.target import any_run, default_run, resolve
from ncsn.config import from_yaml
from ncsn.errors import ConfigError, NotFound
from ncsn.runs.folder import RUN_PATTERN, claim_run


def test_the_same_experiment_gets_the_same_run_name(config_file: Path) -> None:
    one, other = resolve(str(config_file)), resolve(str(config_file))
    assert one.run == other.run
    assert one.run.startswith("tiny-")
    assert RUN_PATTERN.fullmatch(one.run)


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("train.num_images=320", False),
        ("seed=1", False),
        ("data.max_images=32", False),
        ("sampling.num_images=9", True),
        ("evaluation.num_splits=2", True),
        ("compute.num_workers=2", True),
        ("storage.root=/elsewhere", True),
    ],
)
def test_the_run_name_depends_on_what_decides_the_weights(config_file: Path, override: str, same: bool) -> None:
    changed = resolve(str(config_file), overrides=[override])
    assert (changed.run == resolve(str(config_file)).run) is same


def test_the_longest_experiment_name_makes_a_valid_run_name(config_file: Path) -> None:
    config = from_yaml(config_file.read_text(), overrides=[f"name={'n' * 40}"])
    assert RUN_PATTERN.fullmatch(default_run(config))


def test_a_run_brings_its_config(config_file: Path, store: Path) -> None:
    claimed = resolve(str(config_file), overrides=["seed=7"], run="mine")
    claim_run(claimed.config, claimed.run)
    found = resolve(None, run="mine", overrides=[f"storage.root={store}", "sampling.num_images=9"])
    assert found.run == "mine"
    assert found.config.seed == 7
    assert found.config.sampling.num_images == 9


def test_a_checkpoint_brings_its_config_and_its_run(config_file: Path, store: Path) -> None:
    checkpoint = store / "runs" / "mine" / "checkpoints" / "images-000000160"
    storage.write_text(str(checkpoint / "config.yaml"), config_file.read_text())
    found = resolve(None, checkpoint=str(checkpoint))
    assert found.run == "mine"
    assert found.config.name == "tiny"


def test_a_checkpoint_from_elsewhere_gets_the_run_of_its_config(config_file: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "download" / "checkpoints" / "mine"
    storage.write_text(str(checkpoint / "config.yaml"), config_file.read_text())
    assert resolve(None, checkpoint=str(checkpoint)).run == resolve(str(config_file)).run


def test_what_cannot_be_found_is_said(config_file: Path, store: Path, tmp_path: Path) -> None:
    with refused("--config"):
        resolve(None)
    with refused("--run", error=NotFound) as caught:
        resolve(None, run="gone", overrides=[f"storage.root={store}"])
    assert f"{store}/runs/gone/config.yaml" in str(caught.value)
    with refused(str(tmp_path / "absent.yaml"), error=NotFound):
        resolve(str(tmp_path / "absent.yaml"))
    with refused(str(tmp_path), error=ConfigError):
        resolve(str(tmp_path))
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff")
    with refused(str(tmp_path / "image.yaml"), error=ConfigError):
        resolve(str(tmp_path / "image.yaml"))


def test_any_run_of_a_store(config_file: Path, store: Path) -> None:
    overrides = [f"storage.root={store}"]
    with refused("storage.root", error=NotFound):
        any_run(overrides)
    claim_run(resolve(str(config_file)).config, "mine")
    assert any_run(overrides) == "mine"
