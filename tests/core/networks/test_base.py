"""What every score network takes and refuses, and what `unet` and `ddpmpp` have in common."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_networks import SIGMAS, ddpmpp, random_batch, shaken, unet
from torch import Tensor, nn

from ncsn.core.networks.base import ConditionTerms, PreconditionedNetwork, check_levels, num_groups
from ncsn.core.networks.refinenet import NcsnV2Network

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LEVEL = torch.tensor([0, 3, 4, 1])
SIGMA = SIGMAS[LEVEL]
LABELS = torch.tensor([0, 2, -1, 1])
KINDS = ("unet", "ddpmpp")


def make_network(kind: str, **changes: Any) -> Any:
    if kind == "ncsnv2":
        return shaken(NcsnV2Network(4, channels=1, sigmas=SIGMAS))
    small = ddpmpp if kind == "ddpmpp" else unet
    sizes = {"multipliers": (1, 1)} if kind == "ddpmpp" else {"widths": (8, 8)}
    return shaken(small(**(sizes | {"attention_sizes": (4,)} | changes)), but_for="condition_terms")


@pytest.mark.parametrize(("kind", "tolerance"), [(unet, 1e-6), (ddpmpp, 1e-3)])
def test_a_fresh_network_is_the_score_of_a_gaussian_around_mid_gray(kind: Any, tolerance: float) -> None:
    x, _ = random_batch()
    sigma = torch.tensor([3.0, 1.0, 0.3, 0.1, 0.03, 0.001])
    denoised = x + sigma.square()[:, None, None, None] * kind().score_at(x, sigma)
    c_skip = (0.25**2 / (sigma.square() + 0.25**2))[:, None, None, None]
    torch.testing.assert_close(denoised - 0.5, c_skip * (x - 0.5), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["ncsnv2", *KINDS])
def test_level_and_its_sigma_give_the_same_score(kind: str) -> None:
    network = make_network(kind)
    by_level = network(X, LEVEL)
    assert torch.equal(network(X, sigma=SIGMA), by_level)
    assert torch.equal(network.score_at(X, SIGMA), by_level)
    assert not torch.equal(network(X, sigma=1.1 * SIGMA), by_level)


@pytest.mark.parametrize("kind", ["ncsnv2", *KINDS])
@pytest.mark.parametrize("name", ["labels", "augmentation"])
def test_conditions_that_a_network_does_not_take_are_refused(kind: str, name: str) -> None:
    network = make_network(kind)
    with pytest.raises(ValueError, match=name):
        network(X, LEVEL, **{name: torch.zeros(4)})
    assert torch.equal(network(X, LEVEL, **{name: None}), network(X, LEVEL))


@pytest.mark.parametrize(("level", "sigma"), [(None, None), (LEVEL, SIGMA), (None, SIGMA[:2]), (None, LEVEL)])
def test_networks_take_one_noise_level_for_each_image(level: Tensor | None, sigma: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"level|sigma"):
        make_network("unet")(X, level, sigma=sigma)


@pytest.mark.parametrize("level", [[0, 3], [-1, 0], [0], [0.0, 1.0]])
def test_levels_out_of_range_are_refused(level: list[float]) -> None:
    with pytest.raises(ValueError, match="level"):
        check_levels(torch.tensor(level), batch=2, num_levels=3)


def terms(network: PreconditionedNetwork) -> ConditionTerms:
    (found,) = (each for each in network.modules() if isinstance(each, ConditionTerms))
    return found


def without_conditions(network: PreconditionedNetwork, kind: str) -> Any:
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
        layer = plain.get_submodule(plain.condition_reader)
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


@pytest.mark.parametrize(("width", "groups"), [(4, 1), (16, 4), (128, 32), (384, 32), (512, 32), (48, 12), (10, 2)])
def test_number_of_groups(width: int, groups: int) -> None:
    assert num_groups(width) == groups
