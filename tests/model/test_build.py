"""The networks that a config describes."""

from __future__ import annotations

import pytest
import torch

from ncsn.config import from_yaml
from ncsn.model import build

RECTANGLES = """
name: rectangles
data: {source: image_folder, root: x, image_size: [48, 64], channels: 5}
network: {kind: unet, widths: [8]}
train: {num_images: 8, batch_size: 8, checkpoint_every_images: 8, report_every_images: 8}
sampling: {sampler: {kind: annealed_langevin}}
"""
ATTENDING = "blocks_per_resolution: 1, attention_sizes: [12]"


@pytest.mark.parametrize(
    "network",
    [
        "{kind: ncsn, num_features: 4}",
        f"{{kind: unet, widths: [4, 4, 8], {ATTENDING}}}",
        f"{{kind: ddpmpp, base_width: 8, multipliers: [1, 1, 2], {ATTENDING}}}",
    ],
)
def test_every_network_takes_rectangles(network: str) -> None:
    config = from_yaml(RECTANGLES, overrides=[f"network={network}"])
    assert config.data.stored_shape == (48, 64, 5) and config.data.network_shape == (5, 48, 64)
    x, level = torch.rand(2, 5, 48, 64), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        score = build.network(config)(x, level)
    assert score.shape == x.shape and score.isfinite().all()


@pytest.mark.parametrize("channels", [5, 8])  # also as many as the maps of the network have
@pytest.mark.parametrize(
    ("network", "not_hidden"),
    [
        ("{kind: ncsn, num_features: 8}", {"begin_conv", "end_conv"}),
        ("{kind: unet, widths: [8, 8], blocks_per_resolution: 2}", {"input", "output"}),
        (
            "{kind: ddpmpp, base_width: 8, multipliers: [1, 2], attention_sizes: []}",
            {"enc.48x48_conv", "dec.48x48_aux_conv"},
        ),
    ],
)
def test_muon_has_the_convolutions_between_the_first_and_the_last(
    network: str, not_hidden: set[str], channels: int
) -> None:
    changes = [f"network={network}", f"data.channels={channels}", "optimizer.muon={learning_rate: 0.5}"]
    config = from_yaml(RECTANGLES, overrides=changes)
    state = build.train_state(config)
    hidden, others = (set(group["params"]) for group in state.optimizer.param_groups)
    assert hidden | others == set(state.network.parameters())
    convolutions = {name for name, each in state.network.named_modules() if isinstance(each, torch.nn.Conv2d)}
    found = {name.removesuffix(".weight") for name, each in state.trained() if each in hidden}
    assert convolutions - found == not_hidden
    assert [group["initial_lr"] for group in state.optimizer.param_groups] == [0.5, config.optimizer.learning_rate]
