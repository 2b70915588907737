"""One optimizer step."""

import copy
import math

import pytest
import torch

from ncsn.core.ema import Ema, step_decay
from ncsn.core.losses import Batch, DenoisingScoreMatching
from ncsn.core.narrow_weights import NarrowWeights
from ncsn.core.networks import layers
from ncsn.core.networks.ddpmpp import DdpmppNetwork
from ncsn.core.networks.refinenet import NcsnNetwork
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.training import StepOptions, TrainState, train_step

SIGMAS = geometric_sigmas(1.0, 0.01, 4)


def setup(lr=1e-3):
    torch.manual_seed(0)
    network = NcsnNetwork(8, channels=1, num_levels=4)
    state = TrainState(network, torch.optim.SGD(network.parameters(), lr=lr), Ema(network, step_decay(0.9)))
    return state, Batch(torch.rand(4, 1, 8, 8), SIGMAS, torch.randn(4, 1, 8, 8), torch.arange(4))


def step(state, batch, **how):
    options = StepOptions(**how)
    return train_step(state.network, batch, state=state, loss=DenoisingScoreMatching(), options=options)


def test_step_moves_weights_and_average_and_reports_the_loss_before_it():
    state, batch = setup(lr=1e-4)
    before = copy.deepcopy(dict(state.network.named_parameters()))
    losses, grad_norm = step(state, batch)
    for name, parameter in state.network.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 1e-4 * parameter.grad)
        torch.testing.assert_close(state.ema.weights[name], 0.9 * before[name] + 0.1 * parameter)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in state.network.parameters()))
    assert grad_norm.item() == pytest.approx(norm, rel=1e-4)
    later, _ = step(state, batch)
    assert later.mean() < losses.mean() and state.ema.num_updates == 2
    assert not losses.requires_grad


def test_clipping_scales_the_gradient_and_reports_its_norm_from_before():
    _, free = step(*setup())
    state, batch = setup()
    _, clipped = step(state, batch, grad_clip_norm=0.5)
    assert free > 1 and clipped == free
    assert torch.nn.utils.get_total_norm([p.grad for p in state.network.parameters()]).item() == pytest.approx(
        0.5, rel=1e-4
    )


def narrow_setup(*, narrow=True):
    """A network with layers of all kinds, which computes some in float32, and a batch; `narrow` as on a GPU."""
    torch.manual_seed(0)
    network = DdpmppNetwork(
        channels=1, image_size=4, sigmas=SIGMAS, base_width=8, multipliers=(2,), blocks_per_resolution=1,
        attention_sizes=(), augmentation=True,
    )  # fmt: skip
    state = TrainState(network, torch.optim.Adam(network.parameters(), lr=1e-3), Ema(network, step_decay(0.9)))
    state.narrow = NarrowWeights(network, torch.bfloat16) if narrow else None
    return state, Batch(torch.rand(4, 1, 4, 4), SIGMAS, torch.randn(4, 1, 4, 4), torch.arange(4))


@pytest.mark.parametrize("light", [False, True])
def test_narrow_weights_train_as_the_casts_of_autocast_do_also_after_a_restore(light):
    found = []
    for narrow in (False, True):
        state, batch = narrow_setup(narrow=narrow)
        start = copy.deepcopy(state.network.state_dict())
        state.network.enc["4x4_conv"].weight.requires_grad_(not light)
        for number in range(3):
            state.network.load_state_dict(start if number == 1 else state.network.state_dict())
            # Gradients of microbatches of three images add up in float32: not every sum is a number of bfloat16.
            losses, _ = step(state, batch, autocast_dtype=torch.bfloat16, microbatch=3)
        weights = list(state.network.parameters())
        found.append([losses, *weights, *state.ema.weights.values(), *(each.grad for each in weights)])
        assert state.network.state_dict().keys() == start.keys()
        assert {each.dtype for each in copy.deepcopy(state.network).parameters()} == {torch.float32}
        gradient = state.network.dec["4x4_aux_conv"].weight.grad
        assert not torch.equal(gradient, gradient.bfloat16().float())
    assert all(one is other or torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_narrow_weights_are_all_that_autocast_would_cast_and_no_others():
    state, _ = narrow_setup()
    state.narrow.fill()
    copies, parameters = state.narrow.of_pass(), dict(state.network.named_parameters())
    exact = {name for name in parameters if name.startswith(("map_layer", "condition_terms"))}
    assert copies.keys() == {name for name in parameters if "norm" not in name} - exact and len(exact) == 5
    for name, each in copies.items():
        assert isinstance(each, torch.nn.Parameter)  # by which compiled DistributedDataParallel splits its graph
        assert torch.equal(each, parameters[name].bfloat16()) and each.stride() == parameters[name].stride()


def test_a_step_with_narrow_weights_compiles_to_one_graph_once(monkeypatch):
    state, batch = narrow_setup()
    expected = [step(state, batch, autocast_dtype=torch.bfloat16)[0] for _ in range(2)]
    monkeypatch.setattr(layers, "fuses", lambda _: True)
    torch._dynamo.reset()  # of other tests in this process
    state, batch = narrow_setup()
    state.network.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):  # which takes itself back, unlike one of monkeypatch
        found = [step(state, batch, autocast_dtype=torch.bfloat16)[0] for _ in range(2)]
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)
    state.network.compile(options=layers.FUSION)  # RuntimeError, were one not an option of this PyTorch
