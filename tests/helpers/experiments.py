"""The small experiment of most tests, of which others differ by overrides, and its dataset."""

from __future__ import annotations

from ncsn.config import Config, from_yaml
from ncsn.data.dataset import write_dataset
from ncsn.data.sources import open_source

TINY = """
name: tiny
data: {source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3}
noise: {num_levels: 4}
network: {kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}
train: {batch_size: 16, num_images: 160, checkpoint_every_images: 80, report_every_images: 80}
sampling: {num_images: 10, batch_size: 10, sampler: {kind: annealed_langevin, steps_per_level: 1}}
evaluation: {classifier_epochs: 1, num_splits: 2}
"""

# Two steps of training, and few samples at two levels.
SHORT = (
    "noise={num_levels: 2, sigma_L: 0.1}",
    "train={batch_size: 4, num_images: 8, checkpoint_every_images: 8, report_every_images: 4}",
    "sampling={num_images: 4, sampler: {kind: annealed_langevin, steps_per_level: 2, epsilon: 1.0e-4}}",
)


def tiny(root: object, *overrides: str) -> Config:
    """The experiment with its store in a folder."""
    return from_yaml(TINY, overrides=[f"storage.root={root}", *overrides])


def digits(config: Config, root: object) -> str:
    """URI of the config's dataset, written below a folder."""
    return write_dataset(open_source(config.data), str(root), name="digits", data=config.data).uri
