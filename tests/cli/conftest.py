"""A small experiment for the command line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

TINY = """
name: tiny
data: {{source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3, max_images: 64}}
noise: {{num_levels: 4}}
network: {{kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}}
train: {{batch_size: 16, num_images: 160, checkpoint_every_images: 80, report_every_images: 80}}
sampling: {{num_images: 8, sampler: {{kind: annealed_langevin, steps_per_level: 2}}}}
evaluation: {{num_splits: 2}}
storage: {{root: {root}}}
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def config_file(tmp_path: Path, store: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(root=store))
    return path
