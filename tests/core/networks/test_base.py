"""What every score network takes and refuses, and what `unet` and `ddpmpp` have in common."""

import math
from typing import Any

import pytest
import torch
from tiny_networks import SIGMAS, ddpmpp, random_batch, shaken, unet
from torch import Tensor, nn

from ncsn.core.networks.base import ConditionTerms

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LEVEL = torch.tensor([0, 3, 4, 1])
SIGMA = SIGMAS[LEVEL]
LABELS = torch.tensor([0, 2, -1, 1])
KINDS = ("unet", "ddpmpp")


def make_network(kind: str, **changes: Any) -> Any:
    if kind == "ddpmpp":
        return shaken(ddpmpp(multipliers=(1, 1), attention_sizes=(4,), **changes))
    return shaken(unet(widths=(8, 8), attention_sizes=(4,), **changes))


@pytest.mark.parametrize(("kind", "tolerance"), [(unet, 1e-6), (ddpmpp, 1e-3)])
def test_a_fresh_network_is_the_score_of_a_gaussian_around_mid_gray(kind: Any, tolerance: float) -> None:
    x, _ = random_batch()
    sigma = torch.tensor([3.0, 1.0, 0.3, 0.1, 0.03, 0.001])
    denoised = x + sigma.square()[:, None, None, None] * kind().score_at(x, sigma)
    c_skip = (0.25**2 / (sigma.square() + 0.25**2))[:, None, None, None]
    torch.testing.assert_close(denoised - 0.5, c_skip * (x - 0.5), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_level_and_its_sigma_give_the_same_score(kind: str) -> None:
    network = make_network(kind)
    by_level = network(X, LEVEL)
    assert torch.equal(network(X, sigma=SIGMA), by_level)
    assert torch.equal(network.score_at(X, SIGMA), by_level)
    assert not torch.equal(network(X, sigma=1.1 * SIGMA), by_level)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"level": LEVEL, "labels": LABELS}, "labels"),
        ({"level": LEVEL, "augmentation": torch.zeros(4, 9)}, "augmentation"),
        ({}, "level"),
        ({"level": LEVEL, "sigma": SIGMA}, "level"),
        ({"sigma": SIGMA[:2]}, "sigma"),
        ({"sigma": LEVEL}, "sigma"),
        ({"level": torch.tensor([0, 3, 4, 10])}, "level"),
        ({"level": torch.tensor([-1, 3, 4, 1])}, "level"),
        ({"level": LEVEL[:2]}, "level"),
        ({"level": SIGMA}, "level"),
    ],
)
def test_what_a_network_does_not_take_is_refused(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_network("unet")(X, **given)


def test_terms_of_class_and_augmentation() -> None:
    added = ConditionTerms(6, num_classes=5, augmentation=True)
    assert added.map_label is not None and added.map_augment is not None
    nn.init.normal_(added.map_label.bias)
    weight, bias, of_labels = added.map_label.weight, added.map_label.bias, added.map_augment.weight
    h, a = torch.randn(3, 6), torch.randn(3, 9)
    expected = h + bias + a @ of_labels.T
    expected[0] += weight[:, 4] * math.sqrt(5)
    expected[2] += weight[:, 0] * math.sqrt(5)
    torch.testing.assert_close(added(h, torch.tensor([4, -1, 0]), a), expected)
    torch.testing.assert_close(added(h, None, None), h + bias)


@pytest.mark.parametrize("kind", KINDS)
def test_image_score_does_not_depend_on_its_batch_or_on_the_mode_but_for_dropout(kind: str) -> None:
    network = make_network(kind)
    together = network.train()(X, LEVEL)
    alone = torch.cat([network(X[i : i + 1], LEVEL[i : i + 1]) for i in range(len(X))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5 * float(together.detach().abs().max()))
    assert torch.equal(network.eval()(X, LEVEL), together)
    dropping = make_network(kind, dropout=0.5)
    assert not torch.allclose(dropping.train()(X, LEVEL), dropping.eval()(X, LEVEL))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind: str) -> None:
    network = make_network(kind, num_classes=4, augmentation=True)
    network(X, LEVEL, labels=LABELS, augmentation=torch.randn(len(X), 9)).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []
