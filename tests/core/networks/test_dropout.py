"""Dropout by key: the masks are fair, independent, and the image's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncsn.core.networks.normalization import KeyedDropout, image_keys
from ncsn.core.networks.unet import UnetNetwork

P = 0.3


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def masks(x: Tensor, *, layer: int = 0, shape: tuple[int, int, int] = (16, 16, 16)) -> Tensor:
    """1 where an activation is kept, float64 [B, n]."""
    dropout = KeyedDropout(P)
    dropout.layer = layer
    kept: Tensor = dropout(torch.ones(len(x), *shape), image_keys(x))
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / (1 - P)).item()}
    return (kept > 0).double().flatten(1)


def test_the_share_that_is_dropped_is_p() -> None:
    kept = masks(images(64))
    deviation = math.sqrt(P * (1 - P) / kept.numel())
    assert abs(float(kept.mean()) - (1 - P)) < 4 * deviation
    for axis in (0, 1):  # at each place over the images, and in each image
        spread = kept.mean(dim=axis).std() / math.sqrt(P * (1 - P) / kept.shape[axis])
        assert 0.8 < float(spread) < 1.2


def test_images_layers_and_places_have_masks_of_their_own() -> None:
    """Even of images that differ in the last bit of one pixel: correlations are those of independent numbers."""
    x = images(2)
    x[1] = x[0]
    x[1, 0, 0, 0] = torch.nextafter(x[1, 0, 0, 0], torch.tensor(10.0))
    one, other = masks(x)
    for left, right in (
        (one, other),
        (one, masks(x, layer=1)[0]),
        (one[1:], one[:-1]),
        (one[16:], one[:-16]),
        (one[256:], one[:-256]),
    ):
        correlation = torch.corrcoef(torch.stack([left, right]))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(len(left))


def test_a_mask_does_not_depend_on_the_batch_or_on_the_order_in_memory() -> None:
    x = images(6)
    whole = masks(x)
    assert torch.equal(whole, torch.cat([masks(x[:1]), masks(x[1:4]), masks(x[4:])]))
    assert torch.equal(whole, masks(x.contiguous(memory_format=torch.channels_last)))


def test_the_network_drops_in_training_only() -> None:
    settings = {"widths": (8, 8), "blocks_per_resolution": 1, "embedding_features": 8, "attention_sizes": ()}
    network = UnetNetwork(
        channels=3, image_size=8, sigmas=torch.tensor([1.0, 0.1]), dropout=0.5, sigma_data=0.25, **settings
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    layers = [each.layer for each in network.modules() if isinstance(each, KeyedDropout)]
    assert layers == [0, 1, 2, 3]
    x, level = images(6), torch.tensor([0, 1, 0, 1, 0, 1])
    trained = network(x, level)
    torch.testing.assert_close(trained, torch.cat([network(x[:2], level[:2]), network(x[2:], level[2:])]))
    assert not torch.allclose(trained, network.eval()(x, level))
