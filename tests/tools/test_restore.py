"""`ncsn restore` on a small network of real digits: better than what needs no network, exact where pixels are known."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from local_training import train_locally
from PIL import Image
from refused import refused

from ncsn import storage
from ncsn.cli.commands import finished
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.config.noise import LevelsConfig
from ncsn.core.samplers.ode import KarrasHeun, ProbabilityFlow
from ncsn.data.parquet import write_dataset
from ncsn.data.sources.known import open_source
from ncsn.data.training_images import open_cache
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork, load_for_sampling
from ncsn.model.generate import generate
from ncsn.model.restoration.restore import restore, restoring
from ncsn.model.restoration.tasks import (
    METHODS,
    SOLVERS,
    TASKS,
    Restoration,
    degraded,
    given_images,
    outside_box,
    simple_restoration,
)
from ncsn.runs.folder import claim_run
from ncsn.tools.finished import restore as command
from ncsn.training.loop import TrainingJob

EXPERIMENT = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3, num_classes: 10}
noise: {sigma_1: 10.0, sigma_L: 0.01, num_levels: 10, training: {kind: lognormal, mean: -1.2, std: 1.2}}
network: {kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8, sigma_data: 0.4}
loss: {kind: dsm, weighting: edm}
optimizer: {learning_rate: 3.0e-3}
train: {batch_size: 64, num_images: 12800, checkpoint_every_images: 12800, report_every_images: 12800,
        label_dropout: 0.2, ema_decay: 0.99}
sampling: {batch_size: 16, sampler: {kind: karras_heun, num_steps: 4}}
compute: {num_workers: 1}
"""


@dataclass(frozen=True)
class Trained:
    config: Config
    checkpoint: str
    dataset: str

    def restore(self, **settings: object) -> command.RestoreResult:
        """With test images, unless others are given."""
        dataset = None if "images" in settings else self.dataset
        chosen = {"num_images": 24, "steps": 12, **settings}
        return command.run(self.config, run="mine", checkpoint=self.checkpoint, dataset=dataset, **chosen)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("store")
    config = from_yaml(EXPERIMENT, overrides=[f"storage.root={root}"])
    folder = claim_run(config, "mine")
    dataset = write_dataset(open_source(config.data), str(root / "datasets"), name="digits", data=config.data).uri
    outcome = train_locally(TrainingJob(config=config, dataset=dataset, history=folder.history), folder.checkpoints)
    return Trained(config, storage.join(folder.checkpoints, outcome.checkpoint), dataset)


@pytest.mark.parametrize(
    "settings",
    [
        {"task": "inpaint"},
        {"task": "superres", "factor": 2},
        {"task": "deblur", "blur_width": 1.0, "solver": "2m"},
        {"task": "inpaint", "sigma_y": 0.1, "label": "3"},
        {"task": "inpaint", "method": "dps", "steps": 40},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_what_was_given_is_met(trained: Trained, settings: dict[str, object]) -> None:
    result = trained.restore(**settings)
    psnr = result.psnr
    assert psnr["all"] is not None and psnr["simple"] is not None
    if settings.get("sigma_y"):
        assert psnr["known"] == pytest.approx(20, abs=4)  # that of the noise
    elif settings["task"] == "inpaint":
        assert psnr["known"] is None, "known pixels are exact"
    else:
        assert psnr["known"] > psnr["all"] + 10
    images = np.load(Path(result.uri) / "restored.npy")
    assert images.shape == (24, 8, 8, 1) and len(list(Path(result.uri).glob("*.png"))) == 25
    with Image.open(result.grid) as grid:
        assert grid.width / grid.height == pytest.approx((16 * 9 + 1) / (3 * 9 + 1))
    assert trained.restore(**settings) == result


@pytest.mark.parametrize(
    "settings", [Restoration(steps=12), Restoration(task="superres", factor=2, steps=12), Restoration(task="deblur")]
)
def test_the_mean_of_several_is_nearer_to_the_truth_than_what_needs_no_network(
    trained: Trained, settings: Restoration
) -> None:
    loaded = load_for_sampling(trained.checkpoint)
    config, split = loaded.config, open_cache(trained.dataset, "test")
    truth, labels = split.images[:24].copy(), torch.from_numpy(split.labels[:24].astype(np.int64))
    operator, sampling = settings.operator(config, outside_box(8)), restoring(loaded, config.sampling, settings)
    y = degraded(truth, operator, settings, config, seed=0, first=0)
    several = restore(
        loaded, y.repeat(8, 1, 1, 1), operator, settings, sampling=sampling, labels=labels.repeat(8)
    ).reshape(8, *truth.shape)
    simple = simple_restoration(y, operator, loaded.moments, config)
    errors = [float(np.square(made - truth.astype(float)).mean()) for made in (several.mean(axis=0), simple)]
    assert errors[0] < 0.9 * errors[1]


def test_an_image_is_the_same_in_any_batch(trained: Trained) -> None:
    loaded = load_for_sampling(trained.checkpoint)
    settings = Restoration(task="superres", factor=4, steps=6, sigma_y=0.05)
    operator, sampling = settings.operator(loaded.config), restoring(loaded, loaded.config.sampling, settings)
    small = open_cache(trained.dataset, "test").images[:5, ::4, ::4].copy()
    y = given_images(small, operator, loaded.config)
    whole = restore(loaded, y, operator, settings, sampling=sampling)
    part = restore(loaded, y[3:], operator, settings, sampling=sampling, first=3)
    np.testing.assert_allclose(whole[3:].astype(int), part.astype(int), atol=1)


@pytest.mark.parametrize("levels", [None, {"sigma_1": 5.0, "sigma_L": 0.02, "num_levels": 4}])
def test_all_or_nothing_known(trained: Trained, levels: dict[str, float] | None) -> None:
    loaded = load_for_sampling(trained.checkpoint)
    settings = Restoration(steps=6)
    chosen = loaded.config.sampling.model_copy(update={"levels": levels and LevelsConfig(**levels)})
    sampling = restoring(loaded, chosen, settings)
    images = open_cache(trained.dataset, "test").images[:4].copy()
    for known in (True, False):
        operator = settings.operator(loaded.config, np.full((8, 8), known))
        made = restore(loaded, given_images(images, operator, loaded.config), operator, settings, sampling=sampling)
        expected = images if known else generate(loaded, sampling=sampling, first=0, count=4)
        np.testing.assert_array_equal(made, expected)


def test_own_images_and_a_mask_by_the_command(trained: Trained, tmp_path: Path) -> None:
    truth = open_cache(trained.dataset, "test").images[:3, ..., 0]
    known = np.arange(8) % 2 == np.arange(8)[:, None] % 2
    (tmp_path / "given").mkdir()
    for number, image in enumerate(truth):
        Image.fromarray(np.where(known, image, 77)).save(tmp_path / "given" / f"digit{number}.png")
    Image.fromarray(known.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    (tmp_path / "config.yaml").write_text(to_yaml(trained.config))
    arguments = ["restore", "--config", str(tmp_path / "config.yaml"), "--run", "mine", "--json"]
    arguments += ["--checkpoint", trained.checkpoint, "--images", str(tmp_path / "given"), "--steps", "8"]
    arguments += ["--mask", str(tmp_path / "mask.png"), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "ncsn", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["psnr"] == {"known": None}
    for number, image in enumerate(truth):
        with Image.open(tmp_path / "out" / f"digit{number}.png") as picture:
            restored = np.asarray(picture)
        np.testing.assert_array_equal(restored[known], image[known])
        assert (restored[~known] != 77).any()


def test_levels_of_a_network_that_knows_no_others(trained: Trained) -> None:
    loaded = load_for_sampling(trained.checkpoint)
    assert isinstance(build.sampler(restoring(loaded, loaded.config.sampling, Restoration()).sampler), KarrasHeun)
    old = from_yaml(
        EXPERIMENT,
        overrides=[
            "data.num_classes=null",
            "train.label_dropout=0",
            "noise.training={kind: levels}",
            "loss={kind: dsm}",
            "network={kind: ncsn, num_features: 8}",
            "sampling.sampler={kind: annealed_langevin}",
        ],
    )
    scored: list[torch.Tensor] = []

    def network(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        scored.append(level)
        return (0.5 - x) / (0.16 + build.sigmas(old)[level].square().view(-1, 1, 1, 1))

    other = TrainedNetwork(config=old, network=network, moments=loaded.moments)
    settings = Restoration(steps=50)
    sampling = restoring(other, old.sampling, settings)
    assert isinstance(build.sampler(sampling.sampler), ProbabilityFlow)
    operator = settings.operator(old, outside_box(8))
    images = open_cache(trained.dataset, "test").images[:2].copy()
    made = restore(other, given_images(images, operator, old), operator, settings, sampling=sampling)
    np.testing.assert_array_equal(made[:, outside_box(8)], images[:, outside_box(8)])
    assert len(scored) == 2 * 10 - 1


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"task": "colorize"}, "--task"),
        ({"task": "superres", "factor": 3}, "--factor"),
        ({"task": "deblur", "blur_width": 0.0}, "--blur-width"),
        ({"sigma_y": -0.1}, "--sigma-y"),
        ({"steps": 1}, "--steps"),
        ({"label": "cat"}, "--label"),
        ({"mask": "/nothing/there.png"}, "--mask"),
    ],
)
def test_what_does_not_fit_is_one_line(trained: Trained, settings: dict[str, object], key: str) -> None:
    with refused(key):
        trained.restore(**settings)


def test_images_of_another_size_are_refused(trained: Trained, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "large.png")
    with refused("--images"):
        trained.restore(images=str(tmp_path), task="superres", factor=2)
    with refused("--images"):
        (tmp_path / "none").mkdir()
        trained.restore(images=str(tmp_path / "none"))


def test_divergence_is_a_mistake_that_is_named(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncsn.model.restoration.restore.gaussian_variance", lambda _: lambda _: 1e-9)
    with refused("--method"):
        trained.restore(sigma_y=1e-4, steps=10)


def test_logits_allow_known_pixels_only() -> None:
    config = from_yaml(
        EXPERIMENT,
        overrides=[
            "data.logit_transform=true",
            "data.num_classes=null",
            "train.label_dropout=0",
            "noise.training={kind: levels}",
            "noise.sigma_1=30",
            "network={kind: ncsnv2, num_features: 4}",
            "loss={kind: dsm}",
        ],
    )
    Restoration().require_valid(config)
    for settings in (Restoration(task="deblur"), Restoration(sigma_y=0.1)):
        with refused("data.logit_transform"):
            settings.require_valid(config)
    assert torch.equal(torch.from_numpy(outside_box(4)).sum(), torch.tensor(12))


def test_the_command_offers_every_task_solver_and_method() -> None:
    assert (finished.TASKS, finished.SOLVERS, finished.METHODS) == (TASKS, SOLVERS, METHODS)
