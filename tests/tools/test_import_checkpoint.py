"""Synthetic files in the two released formats become checkpoints for training and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from local_training import train_locally
from refused import refused
from safetensors.torch import load_file

from ncsn import storage
from ncsn.config import Config, from_yaml
from ncsn.data.format import load_manifest
from ncsn.data.parquet import write_dataset
from ncsn.data.sources.known import open_source
from ncsn.model import build, checkpoint
from ncsn.model.generate import generate
from ncsn.runs.folder import run_folder
from ncsn.tools import preparation
from ncsn.training.loop import TrainingJob

NETWORKS = {"first": "{kind: ncsn, num_features: 4}", "second": "{kind: ncsnv2, num_features: 4}"}
EXPERIMENT = """
name: released
seed: 3
data: {source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3}
noise: {num_levels: 4}
network: {kind: ncsn}
train: {batch_size: 8, num_images: 64, ema_decay: 0.9, checkpoint_every_images: 64, report_every_images: 16}
sampling: {num_images: 4, sampler: {kind: annealed_langevin, steps_per_level: 1}}
evaluation: {num_splits: 2}
"""


def experiment(root: Path, network: str, *overrides: str) -> Config:
    return from_yaml(EXPERIMENT, overrides=[f"storage.root={root}", f"network={NETWORKS[network]}", *overrides])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    data = from_yaml(EXPERIMENT).data
    return write_dataset(open_source(data), str(tmp_path_factory.mktemp("data")), name="digits", data=data).uri


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def trained(request: pytest.FixtureRequest, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A training of 4 steps, whose state the released files contain."""
    folder = tmp_path_factory.mktemp(request.param)
    config = experiment(folder, request.param, "train.num_images=32")
    outcome = train_locally(TrainingJob(config=config, dataset=dataset), folder)
    return request.param, folder / outcome.checkpoint


def released(trained: tuple[str, Path], path: Path) -> list[Any]:
    """The checkpoint as the authors' code would have written it."""
    name, folder = trained
    weights, moments = load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors")
    network = build.network(experiment(folder, name))
    states = {
        index: {key: moments[f"{parameter}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for index, (parameter, _) in enumerate(network.named_parameters())
    }
    adam = {"state": states, "param_groups": [{"lr": 1e-3, "params": list(states)}]}
    content: list[Any] = [{f"module.{key}": value for key, value in weights.items()}, adam]
    if name == "second":
        content += [0, 4, load_file(folder / "ema.safetensors")]
    torch.save(content, path)
    return content


def test_training_continues_bitwise_and_sampling_finds_it(
    trained: tuple[str, Path], dataset: str, tmp_path: Path
) -> None:
    """4 steps, import, 4 steps: the same as 8 steps."""
    name, folder = trained
    released(trained, tmp_path / "checkpoint.pth")
    config = experiment(tmp_path, name)
    result, again = (
        preparation.import_checkpoint(config, run="mine", file=str(tmp_path / "checkpoint.pth"), dataset=dataset)
        for _ in range(2)
    )
    assert result.images_seen == 32 and result.checkpoint.endswith("/runs/mine/checkpoints/images-000000032")
    assert again == result
    loaded = checkpoint.load_for_sampling(result.checkpoint)
    expected = load_file(folder / ("ema.safetensors" if name == "second" else "weights.safetensors"))
    assert all(torch.equal(parameter, expected[key]) for key, parameter in loaded.network.named_parameters())
    assert generate(loaded, sampling=config.sampling, first=0, count=2).shape == (2, 8, 8, 1)
    checkpoints = Path(run_folder(config, "mine").checkpoints)
    went_on = train_locally(TrainingJob(config=config, dataset=dataset), checkpoints)
    whole = train_locally(TrainingJob(config=config, dataset=dataset), tmp_path / "whole")
    assert went_on.checkpoint == whole.checkpoint == "images-000000064"
    # The file of NCSN has no average, so the average starts again.
    for file in ("weights", "optimizer", *(("ema",) if name == "second" else ())):
        one, two = (
            load_file(folder / whole.checkpoint / f"{file}.safetensors") for folder in (checkpoints, tmp_path / "whole")
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), file


def test_training_continues_in_float16(trained: tuple[str, Path], dataset: str, tmp_path: Path) -> None:
    """The import needs no GPU; the loss scale is that of a new training."""
    name, _ = trained
    released(trained, tmp_path / "checkpoint.pth")
    config = experiment(tmp_path, name, "train.precision=float16", "compute.use_gpu=true")
    result = preparation.import_checkpoint(config, run="half", file=str(tmp_path / "checkpoint.pth"), dataset=dataset)
    state = build.train_state(config)
    state.scaler = torch.amp.GradScaler("cpu")
    digest = load_manifest(dataset).digest
    with storage.local_copy(result.checkpoint) as folder:
        checkpoint.load(folder, config=config, state=state, dataset_digest=digest)
    assert state.images_seen == 32 and state.scaler.get_scale() == 2**16


def test_a_file_that_does_not_fit_is_refused(trained: tuple[str, Path], dataset: str, tmp_path: Path) -> None:
    name, _ = trained
    path = tmp_path / "checkpoint.pth"
    content = released(trained, path)

    def refuses(run: str, key: str, *overrides: str) -> str:
        config = experiment(tmp_path, name, *overrides)
        with refused(key) as caught:
            preparation.import_checkpoint(config, run=run, file=str(path), dataset=dataset)
        return str(caught.value)

    assert "begin_conv.weight" in refuses("features", str(path), "network.num_features=8")
    refuses("kind", "network.kind", "network={kind: unet}")
    if name == "second":
        refuses("levels", "noise", "noise.sigma_1=2")
    content[0]["module.extra"] = content[0].pop("module.end_conv.bias")
    torch.save(content, path)
    error = refuses("names", str(path))
    assert "(end_conv.bias)" in error and "(extra)" in error
    torch.save({"state_dict": content[0]}, path)
    assert "dict" in refuses("type", str(path))


def test_a_run_with_checkpoints_is_refused(trained: tuple[str, Path], dataset: str, tmp_path: Path) -> None:
    name, _ = trained
    released(trained, tmp_path / "checkpoint.pth")
    config = experiment(tmp_path, name)
    folder = run_folder(config, "mine")
    storage.write_text(storage.join(folder.checkpoints, "images-000000008", "checkpoint.json"), "{}")
    with refused("--run"):
        preparation.import_checkpoint(config, run="mine", file=str(tmp_path / "checkpoint.pth"), dataset=dataset)
