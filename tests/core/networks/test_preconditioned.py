"""What `unet` and `ddpmpp` have in common: conditions, one graph, and the entry's arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncsn.core.networks.base import ConditionTerms, PreconditionedNetwork, num_groups
from ncsn.core.networks.ddpmpp import DdpmppNetwork
from ncsn.core.networks.unet import UnetNetwork

SIGMA = torch.tensor([1.0, 0.3, 0.1, 0.03])
X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, -1, 1])
KINDS = ("unet", "ddpmpp")
SETTINGS: dict[str, tuple[type[PreconditionedNetwork], dict[str, Any]]] = {
    "unet": (UnetNetwork, {"widths": (8, 8), "embedding_features": 16}),
    "ddpmpp": (DdpmppNetwork, {"base_width": 16, "multipliers": (1, 1), "embedding_multiplier": 4}),
}


def make_network(kind: str, **changes: Any) -> PreconditionedNetwork:
    """Not at its start, where most of the network has no influence yet."""
    build, settings = SETTINGS[kind]
    shared = {
        "channels": 1,
        "image_size": 8,
        "sigmas": SIGMA,
        "blocks_per_resolution": 1,
        "attention_sizes": (4,),
        "dropout": 0.0,
        "sigma_data": 0.25,
    }
    network = build(**(shared | settings | changes))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            if "condition_terms" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return network


def terms(network: PreconditionedNetwork) -> ConditionTerms:
    (found,) = (each for each in network.modules() if isinstance(each, ConditionTerms))
    return found


def first_layer(network: PreconditionedNetwork) -> nn.Linear:
    if isinstance(network, UnetNetwork):
        return network.embedding.linear1
    assert isinstance(network, DdpmppNetwork)
    return network.map_layer0


def without_conditions(network: PreconditionedNetwork, kind: str) -> PreconditionedNetwork:
    """The same weights in a network that takes none."""
    plain = make_network(kind)
    weights = {name: value for name, value in network.state_dict().items() if "condition_terms" not in name}
    plain.load_state_dict(weights, strict=True)
    return plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [None, torch.zeros(4, 9)])
def test_no_augmentation_is_a_network_without_this_input_bitwise(kind: str, given: Tensor | None) -> None:
    network = make_network(kind, augmentation=True)
    plain = without_conditions(network, kind)
    assert torch.equal(network(X, sigma=SIGMA, augmentation=given), plain(X, sigma=SIGMA))
    assert plain.conditions == frozenset() and network.conditions == {"augmentation"}
    told = torch.zeros(4, 9)
    told[1] = 1
    changed = (network(X, sigma=SIGMA, augmentation=told) != plain(X, sigma=SIGMA)).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_no_class_is_a_network_without_classes_whose_bias_has_the_term(kind: str) -> None:
    network = make_network(kind, num_classes=3)
    nn.init.normal_(terms(network).map_label.bias)  # type: ignore[union-attr]
    plain = without_conditions(network, kind)
    with torch.no_grad():
        layer = first_layer(plain)
        layer.bias += layer.weight @ terms(network).map_label.bias  # type: ignore[union-attr]
    none = torch.full((4,), -1)
    expected = plain(X, sigma=SIGMA)
    torch.testing.assert_close(network(X, sigma=SIGMA, labels=none), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(network(X, sigma=SIGMA), network(X, sigma=SIGMA, labels=none))
    by_class = network(X, sigma=SIGMA, labels=LABELS)
    assert (by_class != network(X, sigma=SIGMA)).flatten(1).any(dim=1).tolist() == [True, True, False, True]


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
def test_a_network_compiles_to_one_graph(kind: str) -> None:
    network = make_network(kind, num_classes=3, augmentation=True, dropout=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")  # raises where the graph would break
    given = {"sigma": SIGMA, "labels": LABELS, "augmentation": torch.randn(4, 9)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(X, **given), network(X, **given))


@pytest.mark.parametrize(("width", "groups"), [(4, 1), (16, 4), (128, 32), (384, 32), (512, 32), (48, 12), (10, 2)])
def test_number_of_groups(width: int, groups: int) -> None:
    assert num_groups(width) == groups
