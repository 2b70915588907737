"""The networks of 2019 and 2020: spec oracle 15, sections 1.4 to 1.6 and 3.2, and a plain implementation."""

import pytest
import torch
from plain_ncsn import PlainNcsn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ncsn.core.networks.refinenet import NcsnNetwork, NcsnV2Network, elu, max_pool


@pytest.mark.oracle(15)
@pytest.mark.parametrize(
    ("n", "channels", "size", "parameters", "forward", "both"),
    [(128, 3, 32, 30_117_635, 19_786_104_832, 59_351_236_608), (64, 1, 28, 7_638_657, 3_786_280_960, 11_357_939_712)],
)
def test_size_names_order_and_cost_of_the_network_of_2019(n, channels, size, parameters, forward, both):
    with torch.device("meta"):
        network = NcsnNetwork(n, channels=channels, num_levels=10)
        released = PlainNcsn(n, channels=channels, num_levels=10).state_dict()
        x, level = torch.empty(1, channels, size, size), torch.zeros(1, dtype=torch.int64)
    assert sum(p.numel() for p in network.parameters()) == parameters
    shapes, expected = ([(k, v.shape) for k, v in each.items()] for each in (network.state_dict(), released))
    assert len(expected) == 173 and shapes == expected
    assert [name for name, _ in network.named_parameters()] == list(released)
    with FlopCounterMode(display=False) as counter:
        score = network(x, level)
        assert score.shape == x.shape and counter.get_total_flops() == forward
        score.sum().backward()
    assert counter.get_total_flops() == both


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return NcsnNetwork(8, channels=2, num_levels=5).eval()


@pytest.fixture(scope="module")
def unconditional():
    torch.manual_seed(0)
    return NcsnV2Network(8, channels=2, sigmas=torch.tensor([10.0, 1.0, 0.1, 0.01])).eval()


@pytest.fixture
def x():
    return torch.rand(3, 2, 12, 8, generator=torch.Generator().manual_seed(0))


def test_a_network_for_its_own_levels_refuses_another_sigma(network, x):
    with pytest.raises(ValueError, match="own noise levels"):
        network(x, sigma=torch.ones(len(x)))


@pytest.mark.oracle(15)
@pytest.mark.parametrize("name", ["network", "unconditional"])
def test_output_depends_on_the_level_and_not_on_the_batch_or_mode(name, x, request):
    network, level = request.getfixturevalue(name), torch.tensor([0, 3, 3])
    out = network(x, level)
    assert not torch.allclose(network(x, torch.tensor([1, 3, 3]))[0], out[0], atol=1e-4)
    alone = torch.cat([network(x[i : i + 1], level[i : i + 1]) for i in range(3)])
    sigma = network.sigmas[level].view(3, 1, 1, 1) if name == "unconditional" else 1.0
    torch.testing.assert_close(sigma * alone, sigma * out, rtol=1e-5, atol=1e-5)
    assert torch.equal(network.train()(x, level), network.eval()(x, level))


@pytest.mark.oracle(15)
@pytest.mark.parametrize(
    ("n", "channels", "size", "depth", "parameters", "entries", "flops"),
    [
        (64, 1, 28, "standard", 7_426_881, 154, 3_786_280_960),
        (128, 3, 64, "standard", 29_694_083, 154, 79_144_419_328),
        (128, 3, 128, "deeper", 83_445_379, 192, 302_015_053_824),
        (128, 3, 256, "deepest", 94_132_611, 230, 838_961_463_296),
    ],
)
def test_size_and_cost_of_the_networks_of_2020(n, channels, size, depth, parameters, entries, flops):
    with torch.device("meta"):
        network = NcsnV2Network(n, channels=channels, sigmas=torch.ones(10), depth=depth)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == entries
    with FlopCounterMode(display=False) as counter:
        x = torch.empty(1, channels, size, size, device="meta")
        assert network(x, torch.zeros(1, dtype=torch.int64, device="meta")).shape == x.shape
    assert counter.get_total_flops() == flops


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


@pytest.mark.oracle(15)
def test_score_times_sigma_does_not_depend_on_the_level(unconditional, x):
    network = unconditional
    scaled = [network(x, torch.full((3,), i)) * network.sigmas[i] for i in range(4)]
    for other in scaled[1:]:
        torch.testing.assert_close(other, scaled[0], rtol=1e-6, atol=1e-6)
    between = network.score_at(x, torch.tensor([5.0, 0.5, 0.02])) * torch.tensor([5.0, 0.5, 0.02]).view(3, 1, 1, 1)
    torch.testing.assert_close(between, scaled[0], rtol=1e-6, atol=1e-6)


def test_scores_and_gradients_are_those_of_the_plain_network():
    torch.manual_seed(0)
    plain, ours = PlainNcsn(8, channels=3, num_levels=10), NcsnNetwork(8, channels=3, num_levels=10)
    ours.load_state_dict(plain.state_dict())
    x, level = torch.rand(4, 3, 16, 16), torch.tensor([0, 3, 7, 9])
    scores = plain(x, level), ours(x, level)
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)
    gradients = (
        torch.autograd.grad(s.square().mean(), n.parameters()) for s, n in zip(scores, (plain, ours), strict=True)
    )
    for theirs, own in zip(*gradients, strict=True):
        assert (theirs - own).norm() <= 1e-4 * theirs.norm() + 1e-7


def test_values_are_pytorch_s_and_derivatives_those_of_differences() -> None:
    x = torch.tensor([-30.0, -3.0, -0.5, -1e-3, 0.7, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.equal(elu(x), functional.elu(x))
    assert gradcheck(elu, (x,)) and gradgradcheck(elu, (x,))
    maps = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(max_pool(maps), functional.max_pool2d(maps, kernel_size=5, stride=1, padding=2))
    assert gradcheck(max_pool, (maps,))
