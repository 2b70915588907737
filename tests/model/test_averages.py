"""Snapshots of two averages, and averages of other widths put together from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refused import refused
from safetensors.torch import load_file
from tiny_networks import MOMENTS, tiny_config

from ncsn import storage
from ncsn.config import Config
from ncsn.core.ema import Ema, exponent_of, power_function
from ncsn.core.training import TrainState
from ncsn.model import averages, build, checkpoint
from ncsn.model.averages import build_average
from ncsn.runs.folder import TrainingFolder, folder_name

POWER = ("train.ema={kind: power}", "train.num_images=800", "train.checkpoint_every_images=800")


def walk(state: TrainState, images: int, *averages_: Ema) -> None:
    """Random steps of the weights, and what follows of the averages."""
    generator = torch.Generator().manual_seed(state.images_seen)
    while state.images_seen < images:
        with torch.no_grad():
            for parameter in state.network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        state.images_seen += 4
        for ema in (*state.averages, *averages_):
            ema.update(state.network, images_seen=state.images_seen, batch=4)


@pytest.fixture(scope="module")
def config() -> Config:
    return tiny_config(*POWER)


def train(config: Config, run: Path, *more: Ema, every: int) -> Path:
    """The checkpoint at the end of a run with a snapshot after each `every` images."""
    state = build.train_state(config)
    for images in range(every, 801, every):
        walk(state, images, *more)
        averages.store(str(run / "ema"), averages.copies(state), images_seen=state.images_seen)
    folder = run / "checkpoints" / folder_name(800)
    folder.mkdir(parents=True)
    checkpoint.snapshot(config=config, state=state, moments=MOMENTS, dataset_digest="d1d1d1d1")(folder)
    return folder


@pytest.fixture(scope="module")
def trained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run with eight snapshots, and the true average of width 0.15."""
    wanted = Ema(build.train_state(config).network, power_function(exponent_of(0.15)))
    return train(config, tmp_path_factory.mktemp("run"), wanted, every=100), wanted.weights


def worst(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


def test_snapshots_hold_both_averages_in_half_precision(trained: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = trained
    place = str(folder.parents[1] / "ema")
    assert averages.snapshots(place) == list(range(100, 801, 100))
    kept = load_file(folder / "ema.safetensors"), load_file(folder / "ema_2.safetensors")
    for name, exact in zip(("0.050", "0.100"), kept, strict=True):
        stored = load_file(Path(place) / folder_name(800) / f"{name}.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
        assert all(torch.equal(stored[key], exact[key].half()) for key in exact)
    assert worst(kept[0], kept[1]) > 0.01


def test_weights_that_float16_cannot_hold_stay_in_float32(config: Config) -> None:
    state = build.train_state(config)
    name, weight = next(iter(state.ema.weights.items()))
    weight.view(-1)[0] = 6.1e4
    kinds = {key: tensor.dtype for key, tensor in averages.copies(state)["0.050.safetensors"].items()}
    assert kinds.pop(name) == torch.float32 and set(kinds.values()) == {torch.float16}


def test_an_average_of_another_width_is_near_the_one_that_was_not_stored(
    config: Config, trained: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    folder, wanted = trained
    built = build_average(str(folder), relative_width=0.15)
    loaded = checkpoint.load_checkpoint(built)
    assert loaded.average is not None and loaded.average["relative_width"] == 0.15
    coefficients = loaded.average["coefficients"].values()
    assert loaded.average["error"] == pytest.approx(0.0331, abs=1e-3)
    assert sum(coefficients) == pytest.approx(1, abs=1e-9) and len(coefficients) == 16
    assert (loaded.config, loaded.images_seen, loaded.dataset_digest) == (config, 800, "d1d1d1d1")
    weights = dict(loaded.network.named_parameters())
    assert worst({name: weights[name] for name in wanted}, wanted) < 0.02
    assert loaded.digest != checkpoint.load_checkpoint(str(folder)).digest
    assert build_average(str(folder), relative_width=0.15) == built
    (found,) = (each for each in averages.find_weights(TrainingFolder(str(folder.parents[1]))) if each.relative_width)
    assert (found.uri, found.relative_width, found.images_seen) == (built, 0.15, 800)


def test_an_average_is_of_the_whole_snapshots_up_to_its_checkpoint(config: Config, tmp_path: Path) -> None:
    folder = train(config, tmp_path, every=200)
    storage.delete(str(tmp_path / "ema" / folder_name(200)))
    (tmp_path / "ema" / folder_name(400) / "0.050.safetensors").write_bytes(b"torn")
    averages.store(str(tmp_path / "ema"), averages.copies(build.train_state(config)), images_seen=1000)
    built = build_average(str(folder), relative_width=0.06)
    average = checkpoint.load_checkpoint(built).average
    assert average is not None and len(average["coefficients"]) == 4


def test_what_cannot_be_built_is_refused(trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, _ = trained
    (unknown := folder.with_name("images-000000250")).mkdir()
    for missing in (unknown, tmp_path / "checkpoints" / "images-000000800"):
        with refused("sampling.relative_width"):
            build_average(str(missing), relative_width=0.1)
    with refused("sampling.relative_width"):
        tiny_config(*POWER, "sampling.relative_width=0.1", "train.ema={kind: decay}")
