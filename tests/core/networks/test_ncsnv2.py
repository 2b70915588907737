"""The 2020 networks: spec 1.5, 3.2 and oracle 15."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ncsn.core.networks.refinenet import NcsnNetwork, NcsnV2Network


@pytest.mark.oracle(15)
@pytest.mark.parametrize(
    ("n", "channels", "size", "depth", "parameters", "entries", "flops"),
    [
        (128, 3, 32, "standard", 29_694_083, 154, 19_786_104_832),
        (64, 1, 28, "standard", 7_426_881, 154, 3_786_280_960),
        (128, 3, 64, "standard", 29_694_083, 154, 79_144_419_328),
        (128, 3, 128, "deeper", 83_445_379, 192, 302_015_053_824),
        (128, 3, 256, "deepest", 94_132_611, 230, None),
    ],
)
def test_size_and_cost_of_the_released_networks(n, channels, size, depth, parameters, entries, flops):
    with torch.device("meta"):
        network = NcsnV2Network(n, channels=channels, sigmas=torch.ones(10), depth=depth)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == entries
    with FlopCounterMode(display=False) as counter:
        x = torch.empty(1, channels, size, size, device="meta")
        assert network(x, torch.zeros(1, dtype=torch.int64, device="meta")).shape == x.shape
    assert flops is None or counter.get_total_flops() == flops


def test_names_are_those_of_the_2019_network_without_the_refine_norms():
    with torch.device("meta"):
        first = NcsnNetwork(16, channels=3, num_levels=10).state_dict()
        second = NcsnV2Network(16, channels=3, sigmas=torch.ones(10)).state_dict()
    expected = {"sigmas": (10,)}
    for name, tensor in first.items():
        if not name.endswith("embed.weight"):
            expected[name] = tuple(tensor.shape)
        elif not name.startswith("refine"):
            for part in ("alpha", "gamma", "beta"):
                expected[name.replace("embed.weight", part)] = (tensor.shape[1] // 3,)
    assert list(expected.items()) == [(name, tuple(tensor.shape)) for name, tensor in second.items()]


@pytest.mark.parametrize(("depth", "extra"), [("deeper", []), ("deepest", ["31"])])
def test_registration_order_of_the_deeper_networks(depth, extra):
    network = NcsnV2Network(4, channels=1, sigmas=torch.ones(2), depth=depth)
    stages = ["1", "2", "3", *extra, "4", "5"]
    expected = ["begin_conv", "normalizer", "end_conv", *(f"res{s}" for s in stages), *(f"refine{s}" for s in stages)]
    assert [name for name, _ in network.named_children()] == expected


@pytest.mark.parametrize(
    ("depth", "sizes"),
    [
        ("standard", {"1": 16, "2": 8, "3": 8, "4": 8}),
        ("deeper", {"1": 16, "2": 8, "3": 4, "4": 4, "5": 4}),
        ("deepest", {"1": 16, "2": 8, "3": 4, "31": 2, "4": 2, "5": 2}),
    ],
)
def test_only_undilated_stages_halve_the_image(depth, sizes):
    network = NcsnV2Network(4, channels=1, sigmas=torch.ones(2), depth=depth)
    seen = {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.shape[-1]}))
    network(torch.rand(1, 1, 16, 16), torch.zeros(1, dtype=torch.int64))
    assert {name[3:]: size for name, size in seen.items() if name.startswith("res")} == sizes
    assert [seen[name] for name in seen if name.startswith("refine")] == [*list(sizes.values())[::-1]]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return NcsnV2Network(8, channels=2, sigmas=torch.tensor([10.0, 1.0, 0.1, 0.01]))


@pytest.fixture
def x():
    return torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.oracle(15)
def test_score_times_sigma_does_not_depend_on_the_level(network, x):
    scaled = [network(x, torch.full((3,), i)) * network.sigmas[i] for i in range(4)]
    for other in scaled[1:]:
        torch.testing.assert_close(other, scaled[0], rtol=1e-6, atol=1e-6)
    between = network.score_at(x, torch.tensor([5.0, 0.5, 0.02])) * torch.tensor([5.0, 0.5, 0.02]).view(3, 1, 1, 1)
    torch.testing.assert_close(between, scaled[0], rtol=1e-6, atol=1e-6)


@pytest.mark.oracle(15)
def test_output_does_not_depend_on_the_batch_or_mode(network, x):
    level = torch.tensor([0, 1, 3])
    out = network(x, level)
    alone = torch.cat([network(x[i : i + 1], level[i : i + 1]) for i in range(3)])
    sigma = network.sigmas[level].view(3, 1, 1, 1)
    torch.testing.assert_close(sigma * alone, sigma * out, rtol=1e-5, atol=1e-5)
    assert torch.equal(network.train()(x, level), network.eval()(x, level))


@pytest.mark.oracle(15)
def test_gradients_reach_every_parameter(x):
    torch.manual_seed(1)
    network = NcsnV2Network(8, channels=2, sigmas=torch.ones(2))
    network(x, torch.zeros(3, dtype=torch.int64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_sizes_that_do_not_halve_are_refused():
    network = NcsnV2Network(4, channels=1, sigmas=torch.ones(2), depth="deepest")
    with pytest.raises(ValueError, match="divisible by 8, got 12 x 16"):
        network(torch.zeros(1, 1, 12, 16), torch.zeros(1, dtype=torch.int64))
