"""The network of 2019: spec oracle 15, sections 1.4 to 1.6, and a plain implementation."""

import pytest
import torch
from plain_ncsn import PlainNcsn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ncsn.core.networks.refinenet import NcsnNetwork, elu


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


@pytest.fixture
def x():
    return torch.rand(3, 2, 12, 8, generator=torch.Generator().manual_seed(0))


def test_a_network_for_its_own_levels_refuses_another_sigma(network, x):
    with pytest.raises(ValueError, match="own noise levels"):
        network(x, sigma=torch.ones(len(x)))


@pytest.mark.oracle(15)
def test_output_depends_on_the_level_and_not_on_the_batch_or_mode(network, x):
    level = torch.tensor([0, 3, 3])
    out = network(x, level)
    assert not torch.allclose(network(x, torch.tensor([1, 3, 3]))[0], out[0], atol=1e-4)
    alone = torch.cat([network(x[i : i + 1], level[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, out, rtol=1e-5, atol=1e-5)
    assert torch.equal(network.train()(x, level), network.eval()(x, level))


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
