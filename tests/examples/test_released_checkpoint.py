"""The released checkpoint format, written here as the original code writes it (spec 1.6)."""

from __future__ import annotations

import pickle

import pytest
import torch
from released_checkpoint import load_released_checkpoint, read_released_checkpoint

from ncsn.core.ema import Ema, step_decay
from ncsn.core.networks.refinenet import NcsnNetwork, NcsnV2Network

SIGMAS = torch.tensor([1.0, 0.1, 0.01])


def first(features=8):
    return NcsnNetwork(features, channels=1, num_levels=3)


def second():
    return NcsnV2Network(8, channels=1, sigmas=SIGMAS)


def step(network, optimizer, seed):
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    network(x, torch.tensor([0, 2])).square().mean().backward()
    optimizer.step()


def trained(make, steps=3):
    torch.manual_seed(0)
    network = make()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for seed in range(steps):
        step(network, optimizer, seed)
    return network, optimizer


def released_list(network, optimizer, *, old_step=False):
    state = optimizer.state_dict()
    if old_step:  # PyTorch of 2019 counted in Python integers.
        state["state"] = {k: {**v, "step": int(v["step"])} for k, v in state["state"].items()}
    return [{f"module.{name}": tensor for name, tensor in network.state_dict().items()}, state]


def load_into(path, make, **kwargs):
    torch.manual_seed(99)
    network = make()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-4)
    ema = Ema(network, step_decay(0.999))
    released = read_released_checkpoint(path)
    load_released_checkpoint(released, network=network, optimizer=optimizer, ema=ema)
    return released, network, optimizer, ema


@pytest.mark.parametrize("zipped", [False, True])
def test_training_goes_on_from_an_ncsn_checkpoint_bitwise(tmp_path, zipped):
    network, optimizer = trained(first)
    path = tmp_path / "checkpoint.pth"
    torch.save(released_list(network, optimizer, old_step=True), path, _use_new_zipfile_serialization=zipped)
    released, loaded, its_optimizer, ema = load_into(path, first)
    assert released.num_steps == ema.num_updates == 3 and released.ema is None
    assert its_optimizer.param_groups[0]["lr"] == 5e-4
    for group in (optimizer.param_groups, its_optimizer.param_groups):
        group[0]["lr"] = 1e-3
    for name, parameter in loaded.named_parameters():
        assert torch.equal(ema.weights[name], parameter)
    step(network, optimizer, 7)
    step(loaded, its_optimizer, 7)
    for (name, a), b in zip(network.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_ncsnv2_checkpoint_brings_its_average(tmp_path):
    network, optimizer = trained(second)
    ema = {name: parameter.detach() + 1 for name, parameter in network.named_parameters()}
    path = tmp_path / "checkpoint.pth"
    torch.save([*released_list(network, optimizer), 1, 3, ema], path)
    released, loaded, _, its_ema = load_into(path, second)
    assert released.num_steps == 3 and "sigmas" not in its_ema.weights
    assert all(torch.equal(its_ema.weights[name], ema[name]) for name in ema)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def refused(path, make, match):
    torch.manual_seed(1)
    network = make()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer, ema = torch.optim.Adam(network.parameters()), Ema(network, step_decay(0.9))
    with pytest.raises(ValueError, match=match):
        load_released_checkpoint(read_released_checkpoint(path), network=network, optimizer=optimizer, ema=ema)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not optimizer.state


def test_checkpoint_of_another_network_is_refused_and_nothing_changes(tmp_path):
    network, optimizer = trained(first)
    torch.save(released_list(network, optimizer), tmp_path / "a.pth")
    refused(tmp_path / "a.pth", second, r"\(normalizer\.alpha, .*\(normalizer\.embed\.weight, ")
    refused(tmp_path / "a.pth", lambda: first(16), r"begin_conv\.weight .*\[8, 1, 3, 3\].*\[16, 1, 3, 3\]")


class Hostile:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_code_inside_a_file_does_not_run(tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps([Hostile(), {}], protocol=2))
    torch.save([Hostile(), {}], tmp_path / "evil_zip.pth")
    for name in ("evil.pth", "evil_zip.pth"):
        with pytest.raises(ValueError, match=name):
            read_released_checkpoint(tmp_path / name)
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"a": torch.zeros(1)}, "dict"),
        ([torch.zeros(1)] * 3, "3"),
        ([[1], {}], "state dict"),
        ([{"a": torch.zeros(1)}, {}], "optimizer"),
    ],
)
def test_other_files_are_refused(tmp_path, content, match):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=match):
        read_released_checkpoint(tmp_path / "a.pth")
