"""A tiny experiment and its dataset, shared by the tests of training and sampling."""

from __future__ import annotations

import pytest
from experiments import digits

from ncsn.config import from_yaml

TINY = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3, horizontal_flip: true}
noise: {num_levels: 4}
network: {kind: unet, widths: [8, 8], blocks_per_resolution: 1, embedding_features: 8}
optimizer: {warmup_images: 32, decay: cosine, grad_clip_norm: 1.0}
train: {batch_size: 16, num_images: 160, ema: {kind: decay, per_step: 0.9}, checkpoint_every_images: 80,
  report_every_images: 32, keep_checkpoints: 10}
sampling: {num_images: 10, batch_size: 4, sampler: {kind: annealed_langevin, steps_per_level: 2}}
compute: {num_workers: 1}
"""


@pytest.fixture(scope="session")
def tiny() -> str:
    """YAML of the experiment."""
    return TINY


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of the digits, in parts of 32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncsn.data.format.PART_IMAGES", 32)
        return digits(from_yaml(TINY), tmp_path_factory.mktemp("data"))
