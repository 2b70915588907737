"""A checkpoint restores everything or says what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refused import refused
from safetensors.torch import load_file

from ncsn.config import Config, from_yaml
from ncsn.core.images import fit_moments
from ncsn.core.losses import Batch
from ncsn.core.training import TrainState, train_step
from ncsn.model import build, checkpoint

TEXT = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1}
noise: {num_levels: 4}
network: {kind: unet, widths: [8, 8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 8, num_images: 16, checkpoint_every_images: 8, report_every_images: 8}
sampling: {num_images: 4, sampler: {kind: annealed_langevin, steps_per_level: 1}}
evaluation: {num_splits: 2}
"""


MOMENTS = fit_moments(torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), num_components=4)


def trained(config: Config) -> TrainState:
    """A state after one step, so that every part of it is filled."""
    state = build.train_state(config)
    levels = torch.arange(4)
    batch = Batch(torch.rand(4, 1, 8, 8), build.sigmas(config)[levels], torch.randn(4, 1, 8, 8), levels)
    options = build.step_options(config, world_size=1)
    train_step(state.network, batch, state=state, loss=build.loss(config), options=options)
    state.images_seen = 32
    return state


@pytest.fixture
def config() -> Config:
    return from_yaml(TEXT)


@pytest.fixture
def saved(config: Config, tmp_path: Path) -> Path:
    checkpoint.snapshot(config=config, state=trained(config), moments=MOMENTS, dataset_digest="d1").write(tmp_path)
    return tmp_path


def test_restores_every_part_exactly(config: Config, tmp_path: Path) -> None:
    before, after = trained(config), build.train_state(config)
    checkpoint.snapshot(config=config, state=before, moments=MOMENTS, dataset_digest="d1").write(tmp_path)
    checkpoint.restore(tmp_path, config=config, state=after, dataset_digest="d1")
    assert after.images_seen == 32 and after.ema.num_updates == 1
    for name, tensor in before.network.state_dict().items():
        assert torch.equal(after.network.state_dict()[name], tensor)
    for name, tensor in before.ema.weights.items():
        assert torch.equal(after.ema.weights[name], tensor)
    old, new = before.optimizer.state_dict()["state"], after.optimizer.state_dict()["state"]
    assert old.keys() == new.keys() and len(old) == len(list(before.network.parameters()))
    for number in old:
        assert all(torch.equal(old[number][key], new[number][key]) for key in old[number])


def test_a_snapshot_stays_as_it_was_while_training_goes_on(config: Config, tmp_path: Path) -> None:
    state, folders = trained(config), (tmp_path / "at once", tmp_path / "later")
    for folder in folders:
        folder.mkdir()
    snapshot = checkpoint.snapshot(config=config, state=state, moments=MOMENTS, dataset_digest="d1")
    snapshot.write(folders[0])
    with torch.no_grad():
        for tensor in (*state.network.state_dict().values(), *state.ema.weights.values()):
            tensor.add_(1)
        for moments in state.optimizer.state.values():
            for moment in moments.values():
                moment.add_(1)
    snapshot.write(folders[1])
    for name in (*checkpoint.FILES, checkpoint.INDEX):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_sampling_needs_the_checkpoint_and_nothing_else(config: Config, saved: Path) -> None:
    loaded = checkpoint.load_checkpoint(str(saved))
    assert loaded.config == config and loaded.images_seen == 32 and len(loaded.digest) == 16
    weights = load_file(saved / "ema.safetensors")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in loaded.network.named_parameters())
    assert not loaded.network.training
    assert torch.equal(loaded.moments.mean, MOMENTS.mean)
    assert torch.equal(loaded.moments.directions, MOMENTS.directions)
    assert loaded.moments.rest == pytest.approx(MOMENTS.rest, rel=1e-6)


@pytest.mark.parametrize("damage", [None, b"{", b"\xff"])
@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.INDEX])
def test_a_missing_cut_or_altered_file_is_named(config: Config, saved: Path, name: str, damage: bytes | None) -> None:
    if damage is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(damage)
    with refused(str(saved), error=checkpoint.DamagedError) as caught:
        checkpoint.restore(saved, config=config, state=build.train_state(config), dataset_digest="d1")
    assert name in caught.value.problems[0].reason


@pytest.mark.parametrize(("overrides", "digest"), [(["noise.sigma_1=2.0"], "d1"), ([], "d2")])
def test_another_config_and_other_images_are_refused(saved: Path, overrides: list[str], digest: str) -> None:
    other = from_yaml(TEXT, overrides=overrides)
    with refused(str(saved), error=checkpoint.CheckpointError) as caught:
        checkpoint.restore(saved, config=other, state=build.train_state(other), dataset_digest=digest)
    assert (overrides or [digest])[0].partition("=")[0] in caught.value.problems[0].reason


def test_missing_and_extra_tensors_are_counted_and_named(config: Config, saved: Path) -> None:
    weights = load_file(saved / "ema.safetensors")
    first, *_ = sorted(weights)
    weights["stranger"] = weights.pop(first)
    with refused("here", error=checkpoint.CheckpointError) as caught:
        checkpoint.network_from_weights(config, weights, origin="here")
    assert "(stranger)" in caught.value.problems[0].reason
    assert first in str(caught.value)


def test_no_folder_is_a_clear_error(tmp_path: Path) -> None:
    with refused(str(tmp_path / "nowhere"), error=checkpoint.CheckpointError):
        checkpoint.load_checkpoint(str(tmp_path / "nowhere"))
