"""The 2019 network: spec oracle 15, sections 1.4 to 1.6."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ncsn.core.networks.refinenet import NcsnNetwork


def emb(name, width):
    return {f"{name}.embed.weight": (10, 3 * width)}


def conv(name, inside, out, *, size=3, bias=True):
    weights = {f"{name}.weight": (out, inside, size, size)}
    return {**weights, f"{name}.bias": (out,)} if bias else weights


def rcu(name, width, blocks):
    entries = {}
    for b in range(1, blocks + 1):
        for s in (1, 2):
            entries |= emb(f"{name}.{b}_{s}_norm", width) | conv(f"{name}.{b}_{s}_conv", width, width, bias=False)
    return entries


def refine(name, inputs, width, *, blocks=1):
    entries = {}
    for j, c in enumerate(inputs):
        entries |= rcu(f"{name}.adapt_convs.{j}", c, 2)
    entries |= rcu(f"{name}.output_convs", width, blocks)
    if len(inputs) > 1:
        for j, c in enumerate(inputs):
            entries |= conv(f"{name}.msf.convs.{j}", c, width)
        for j, c in enumerate(inputs):
            entries |= emb(f"{name}.msf.norms.{j}", c)
    for j in (0, 1):
        entries |= conv(f"{name}.crp.convs.{j}", width, width, bias=False)
    for j in (0, 1):
        entries |= emb(f"{name}.crp.norms.{j}", width)
    return entries


def res(name, inside, out, shortcut):
    middle = inside
    pooled = ".conv" if shortcut == "pooled" else ""
    entries = conv(f"{name}.conv1", inside, middle) | emb(f"{name}.normalize2", middle)
    entries |= conv(f"{name}.conv2{pooled}", middle, out)
    if shortcut == "pooled":
        entries |= conv(f"{name}.shortcut.conv", inside, out, size=1)
    if shortcut == "dilated":
        entries |= conv(f"{name}.shortcut", inside, out)
    return entries | emb(f"{name}.normalize1", inside)


def released_state_dict(n, c):
    """Names and shapes of spec 1.6 in the order of registration."""
    return (
        conv("begin_conv", c, n) | emb("normalizer", n) | conv("end_conv", n, c)
        | res("res1.0", n, n, None) | res("res1.1", n, n, None)
        | res("res2.0", n, 2 * n, "pooled") | res("res2.1", 2 * n, 2 * n, None)
        | res("res3.0", 2 * n, 2 * n, "dilated") | res("res3.1", 2 * n, 2 * n, None)
        | res("res4.0", 2 * n, 2 * n, "dilated") | res("res4.1", 2 * n, 2 * n, None)
        | refine("refine1", [2 * n], 2 * n) | refine("refine2", [2 * n, 2 * n], 2 * n)
        | refine("refine3", [2 * n, 2 * n], n) | refine("refine4", [n, n], n, blocks=3)
    )  # fmt: skip


@pytest.mark.oracle(15)
@pytest.mark.parametrize(
    ("n", "channels", "size", "parameters", "tables", "forward", "both"),
    [
        (128, 3, 32, 30_117_635, 433_920, 19_786_104_832, 59_351_236_608),
        (64, 1, 28, 7_638_657, 216_960, 3_786_280_960, 11_357_939_712),
    ],
)
def test_size_names_order_and_cost_of_the_released_network(n, channels, size, parameters, tables, forward, both):
    with torch.device("meta"):
        network = NcsnNetwork(n, channels=channels, num_levels=10)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(p.numel() for name, p in network.named_parameters() if ".embed." in name) == tables
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    expected = released_state_dict(n, channels)
    assert len(expected) == 173
    assert list(shapes.items()) == list(expected.items())
    assert [name for name, _ in network.named_parameters()] == list(expected)
    with FlopCounterMode(display=False) as counter:
        x = torch.empty(1, channels, size, size, device="meta")
        score = network(x, torch.zeros(1, dtype=torch.int64, device="meta"))
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


@pytest.mark.oracle(15)
def test_stage_sizes(network, x):
    shapes = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
        for name, module in network.named_children()
    ]
    network(x, torch.zeros(3, dtype=torch.int64))
    for handle in handles:
        handle.remove()
    full, half = (12, 8), (6, 4)
    expected = {"begin_conv": (8, *full), "res1": (8, *full), "res2": (16, *half), "res3": (16, *half)}
    expected |= {"res4": (16, *half), "refine1": (16, *half), "refine2": (16, *half), "refine3": (8, *half)}
    expected |= {"refine4": (8, *full), "normalizer": (8, *full), "end_conv": (2, *full)}
    assert shapes == expected


@pytest.mark.oracle(15)
def test_output_depends_on_the_level_and_not_on_the_batch_or_mode(network, x):
    level = torch.tensor([0, 3, 3])
    out = network(x, level)
    assert not torch.allclose(network(x, torch.tensor([1, 3, 3]))[0], out[0], atol=1e-4)
    alone = torch.cat([network(x[i : i + 1], level[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, out, rtol=1e-5, atol=1e-5)
    network.train()
    assert torch.equal(network(x, level), out)
    network.eval()


def test_double_precision_agrees(network, x):
    level = torch.tensor([0, 2, 4])
    exact = NcsnNetwork(8, channels=2, num_levels=5).double()
    exact.load_state_dict(network.state_dict())
    error = (network(x, level) - exact(x.double(), level)).abs().max() / exact(x.double(), level).abs().max()
    assert error < 1e-5


@pytest.mark.oracle(15)
def test_gradients_reach_every_parameter_and_only_the_used_levels(x):
    torch.manual_seed(1)
    network = NcsnNetwork(8, channels=2, num_levels=5)
    network(x, torch.tensor([0, 3, 3])).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        if name.endswith("embed.weight"):
            assert parameter.grad[[1, 2, 4]].eq(0).all() and parameter.grad[[0, 3]].ne(0).any(dim=1).all(), name


def test_autocast_keeps_feature_maps_in_bfloat16_and_norm_tables_in_float32(network, x):
    types = {}
    handle = network.res1[0].normalize2.register_forward_hook(
        lambda module, inputs, out: types.update(inside=inputs[0].dtype, out=out.dtype, table=module.embed.weight.dtype)
    )
    level = torch.tensor([0, 2, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = network(x, level)
    handle.remove()
    assert types == {"inside": torch.bfloat16, "out": torch.bfloat16, "table": torch.float32}
    full = network(x, level)
    assert (low.float() - full).norm() < 0.05 * full.norm()


def test_odd_sizes_are_refused(network):
    with pytest.raises(ValueError, match="divisible by 2, got 7 x 8"):
        network(torch.zeros(1, 2, 7, 8), torch.zeros(1, dtype=torch.int64))


def test_images_in_unit_range_are_centred_and_logits_are_not(network, x):
    level = torch.tensor([0, 2, 4])
    logits = NcsnNetwork(8, channels=2, num_levels=5, rescale=False)
    logits.load_state_dict(network.state_dict())
    assert torch.equal(network(x, level), logits(2 * x - 1, level))
