"""The 2019 network against its plainest implementation, which was written by itself from the specification."""

from __future__ import annotations

import torch

from benchmarks.plain_ncsn import PlainNcsn
from ncsn.core.networks.refinenet import NcsnNetwork


def test_scores_and_gradients_are_those_of_the_plain_network():
    torch.manual_seed(0)
    plain, ours = PlainNcsn(8, channels=3, num_levels=10), NcsnNetwork(8, channels=3, num_levels=10)
    ours.load_state_dict(plain.state_dict())
    assert list(plain.state_dict()) == list(ours.state_dict())
    x, level = torch.rand(4, 3, 16, 16), torch.tensor([0, 3, 7, 9])
    scores = plain(x, level), ours(x, level)
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)
    gradients = (
        torch.autograd.grad(s.square().mean(), n.parameters()) for s, n in zip(scores, (plain, ours), strict=True)
    )
    for theirs, own in zip(*gradients, strict=True):
        assert (theirs - own).norm() <= 1e-4 * theirs.norm() + 1e-7
