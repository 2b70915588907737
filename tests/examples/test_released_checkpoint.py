"""The released checkpoint format, written here as the original code writes it (spec 1.6)."""

from __future__ import annotations

import pytest
import torch
from released_checkpoint import load_released_checkpoint, read_released_checkpoint

from ncsn.core.ema import Ema, step_decay
from ncsn.core.networks.refinenet import NcsnNetwork, NcsnV2Network


def step(network, optimizer, seed):
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    network(x, torch.tensor([0, 2])).square().mean().backward()
    optimizer.step()


def of_2019(features=8):
    return NcsnNetwork(features, channels=1, num_levels=3)


def of_2020():
    return NcsnV2Network(8, channels=1, sigmas=torch.tensor([1.0, 0.1, 0.01]))


def trained(network):
    """The network with its optimizer, and what the original code saves of them after three steps."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for seed in range(3):
        step(network, optimizer, seed)
    adam = optimizer.state_dict()
    # PyTorch of 2019 counted in Python integers.
    adam["state"] = {number: state | {"step": int(state["step"])} for number, state in adam["state"].items()}
    return network, optimizer, [{f"module.{name}": each for name, each in network.state_dict().items()}, adam]


def load_into(network, path):
    optimizer, ema = torch.optim.Adam(network.parameters(), lr=5e-4), Ema(network, step_decay(0.999))
    released = read_released_checkpoint(path)
    load_released_checkpoint(released, network=network, optimizer=optimizer, ema=ema)
    return released, optimizer, ema


@pytest.mark.parametrize("zipped", [False, True])
def test_training_goes_on_from_an_ncsn_checkpoint_bitwise(tmp_path, zipped):
    network, optimizer, saved = trained(of_2019())
    torch.save(saved, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    loaded = of_2019()
    released, its_optimizer, ema = load_into(loaded, tmp_path / "checkpoint.pth")
    assert released.num_steps == ema.num_updates == 3 and released.ema is None
    assert its_optimizer.param_groups[0]["lr"] == 5e-4
    its_optimizer.param_groups[0]["lr"] = 1e-3
    assert all(torch.equal(ema.weights[name], parameter) for name, parameter in loaded.named_parameters())
    step(network, optimizer, 7)
    step(loaded, its_optimizer, 7)
    for (name, one), other in zip(network.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_ncsnv2_checkpoint_brings_its_average(tmp_path):
    network, _, saved = trained(of_2020())
    average = {name: parameter.detach() + 1 for name, parameter in network.named_parameters()}
    torch.save([*saved, 1, 3, average], tmp_path / "checkpoint.pth")
    loaded = of_2020()
    released, _, ema = load_into(loaded, tmp_path / "checkpoint.pth")
    assert released.num_steps == 3 and "sigmas" not in ema.weights
    assert all(torch.equal(ema.weights[name], average[name]) for name in average)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (of_2020(), r"\(normalizer\.alpha, .*\(normalizer\.embed\.weight, "),
        (of_2019(16), r"begin_conv\.weight .*\[8, 1, 3, 3\].*\[16, 1, 3, 3\]"),
    ],
)
def test_checkpoint_of_another_network_is_refused_and_nothing_changes(tmp_path, other, match):
    torch.save(trained(of_2019())[2], tmp_path / "a.pth")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        load_into(other, tmp_path / "a.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


class Hostile:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([Hostile(), {}], "a.pth"),
        ({"a": torch.zeros(1)}, "dict"),
        ([torch.zeros(1)] * 3, "3"),
        ([[1], {}], "state dict"),
        ([{"a": torch.zeros(1)}, {}], "optimizer"),
    ],
)
def test_other_files_are_refused_and_code_inside_does_not_run(tmp_path, capsys, content, match):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=match):
        read_released_checkpoint(tmp_path / "a.pth")
    assert capsys.readouterr().out == ""
