"""Training at any sigma: its curves, its held-out loss, and that a resumed training is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from local_training import assert_same_tensors, train_locally

from ncsn.config import Config, from_yaml
from ncsn.config.training import DsmLossConfig
from ncsn.model import build, checkpoint
from ncsn.model.generate import generate
from ncsn.runs.history import EDM_LOSS, HELD_OUT_EDM, TrainingHistory, load_history, loss_names
from ncsn.training import held_out
from ncsn.training.loop import TrainingJob

CONTINUOUS = (
    "noise={sigma_1: 8.0, sigma_L: 0.01, num_levels: 6, training: {kind: lognormal, mean: -1.37}}",
    "network.sigma_data=0.42",
    "loss={kind: dsm, weighting: edm}",
    "train.ema={kind: half_life}",
    "sampling.sampler={kind: karras_heun, num_steps: 4}",
)


@pytest.fixture
def config(tiny: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(held_out, "SHARE", 1.0)
    monkeypatch.setattr(held_out, "FEW_IMAGES", 10)
    return from_yaml(tiny, overrides=[*CONTINUOUS, "network.dropout=0.1"])


def trained(config: Config, dataset: str, folder: Path, *, stop_at: int | None = None) -> TrainingHistory:
    uri = str(folder / "history.json")
    train_locally(TrainingJob(config=config, dataset=dataset, history=uri, stop_at=stop_at), folder / "checkpoints")
    return load_history(uri)


@pytest.mark.parametrize("weighting", ["edm", "learned"])
def test_curves_are_by_bin_and_a_resumed_training_is_the_same(
    config: Config, dataset: str, tmp_path: Path, weighting: str
) -> None:
    config = config.model_copy(update={"loss": DsmLossConfig(weighting=weighting)})
    whole = trained(config, dataset, tmp_path / "whole")
    names = loss_names(build.training_noise(config).bins.tolist())
    assert len(set(names)) == 10 and {name for p in whole.points for name in p if "loss_sigma_" in name} == set(names)
    first, last = whole.curve(EDM_LOSS)[[0, -1]]
    assert last < first
    assert np.isfinite(whole.curve(HELD_OUT_EDM)[-1])
    trained(config, dataset, tmp_path / "halves", stop_at=80)
    halves = trained(config, dataset, tmp_path / "halves")
    for name in {name for point in whole.points for name in point} - {"train/images_per_second"}:
        np.testing.assert_array_equal(halves.curve(name), whole.curve(name))
    places = [tmp_path / each / "checkpoints" / "images-000000160" for each in ("whole", "halves")]
    assert_same_tensors(*places)
    model = checkpoint.load_checkpoint(str(places[0]))
    assert generate(model, sampling=model.config.sampling, first=0, count=2).shape == (2, 8, 8, 1)


@pytest.mark.parametrize("overrides", [["loss={kind: ssm}"], ["network={kind: ncsnv2, num_features: 4}", "loss={}"]])
def test_other_losses_and_networks_train_at_any_sigma(
    tiny: str, dataset: str, tmp_path: Path, overrides: list[str]
) -> None:
    config = from_yaml(tiny, overrides=[*CONTINUOUS[:1], *overrides, "train.num_images=32"])
    history = trained(config, dataset, tmp_path)
    assert np.isfinite(history.curve("train/loss")).all()
    assert np.isfinite(history.curve(EDM_LOSS)).all() == hasattr(config.network, "sigma_data")
