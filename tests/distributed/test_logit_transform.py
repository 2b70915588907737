"""Training and sampling on logits of the pixels: the start, the samples and known pixels are in the right space."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from local_training import train_locally
from torch import Tensor, nn

from ncsn.config import Config, changed_settings, from_yaml
from ncsn.core.images import LOGIT_MARGIN, DataMoments
from ncsn.data.training_images import open_cache
from ncsn.model import build, checkpoint
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.generate import complete, generate
from ncsn.training.batches import draw_batch, image_moments
from ncsn.training.loop import TrainingJob

LOGIT = (
    "data.logit_transform=true",
    "data.horizontal_flip=false",
    "noise={sigma_1: 30.0, sigma_L: 0.05, num_levels: 12}",
    "network={kind: ncsnv2, num_features: 4}",
    "train.num_images=32",
)
FLOW = "sampling.sampler={kind: probability_flow, method: heun}"
LANGEVIN = "sampling.sampler={kind: annealed_langevin, steps_per_level: 60, epsilon: 2.5e-4}"


class GaussianScore(nn.Module):
    """Score of N(mean, s2 I) plus noise."""

    def __init__(self, mean: Tensor, s2: float, sigmas: Tensor) -> None:
        super().__init__()
        self.mean, self.s2, self.sigmas = mean, s2, sigmas

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return (self.mean - x) / (self.s2 + self.sigmas[level].square()).view(-1, 1, 1, 1)


def test_a_batch_is_the_logit_of_the_dequantized_images(tiny: str, dataset: str) -> None:
    config, split = from_yaml(tiny, overrides=LOGIT), open_cache(dataset, "train")
    plain = draw_batch(from_yaml(tiny, overrides=[*LOGIT, "data.logit_transform=false"]), split, first=0, count=64)
    batch = draw_batch(config, split, first=0, count=64)
    unit = torch.sigmoid(batch.x.double())
    assert torch.allclose(unit, LOGIT_MARGIN + (1 - 2 * LOGIT_MARGIN) * plain.x.double(), atol=1e-6)
    assert batch.x.min() < -5 and batch.x.max() > 5 and torch.equal(batch.z, plain.z)
    bare = from_yaml(tiny, overrides=[*LOGIT, "data.dequantize=false"])
    assert draw_batch(bare, split, first=0, count=64).x.min().item() == pytest.approx(-13.8155, abs=1e-3)


def test_moments_are_those_of_what_the_network_sees(tiny: str, dataset: str) -> None:
    config, split = from_yaml(tiny, overrides=LOGIT), open_cache(dataset, "train")
    seen = draw_batch(config, split, first=0, count=len(split)).x
    moments = image_moments(config, split)
    spread = float(moments.variances.sum()) + moments.rest * (64 - len(moments.variances))
    assert (moments.mean - seen.mean(dim=0)).abs().max() < 0.1
    assert spread == pytest.approx(float(seen.var(dim=0).sum()), rel=0.01)


@pytest.mark.parametrize("sampler", [FLOW, LANGEVIN])
def test_an_exact_score_gives_back_the_images_of_its_law(sampler: str, tiny: str) -> None:
    config = from_yaml(tiny, overrides=[*LOGIT, sampler])
    mean = torch.linspace(-4, 4, 64).view(1, 8, 8)
    network = GaussianScore(mean, 1.0, build.sigmas(config))
    moments = DataMoments(mean=mean, directions=torch.eye(64)[:1], variances=torch.ones(1), rest=1.0)
    trained = TrainedNetwork(config=config, network=network, moments=moments)
    states: list[Tensor] = []
    images = generate(
        trained, sampling=config.sampling, first=0, count=256, on_level=lambda _, x: states.append(x.clone())
    )
    law = torch.sigmoid(mean + torch.randn(20_000, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert np.abs(images.mean(axis=0)[..., 0] / 255 - law.mean(dim=0)[0].numpy()).max() < 0.06
    assert np.abs(images.std(axis=0)[..., 0] / 255 - law.std(dim=0)[0].numpy()).max() < 0.06
    assert all(state.min() >= 0 and state.max() <= 1 for state in states)  # observers see pixels, not logits


def trained_on_logits(config: Config, dataset: str, folder: Path) -> checkpoint.SamplingCheckpoint:
    outcome = train_locally(TrainingJob(config=config, dataset=dataset), folder)
    return checkpoint.load_for_sampling(str(folder / outcome.checkpoint))


def test_train_then_sample_and_inpaint(tiny: str, dataset: str, tmp_path: Path) -> None:
    config = from_yaml(tiny, overrides=LOGIT)
    trained = trained_on_logits(config, dataset, tmp_path)
    assert not trained.network.rescale
    images = generate(trained, sampling=config.sampling, first=0, count=4)
    assert images.dtype == np.uint8 and images.std() > 0
    real = np.asarray(open_cache(dataset, "test").images[:4])
    known = np.zeros((8, 8), np.bool_)
    known[:, :4] = True
    completed = complete(trained, real, known, sampling=config.sampling)
    assert np.array_equal(completed[:, :, :4], real[:, :, :4])


def test_the_transform_is_part_of_the_runs_identity(tiny: str) -> None:
    one, other = (from_yaml(tiny, overrides=[f"data.logit_transform={value}"]) for value in ("true", "false"))
    assert changed_settings(one, other) == {"data.logit_transform": (True, False)}
