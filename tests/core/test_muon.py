"""Muon: known singular values, and where it is used."""

from __future__ import annotations

import torch
from torch import nn

from ncsn.core.training import Muon, orthogonalized


def test_orthogonalized_matrices_keep_their_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((16, 72), (72, 16), (16, 16)):
        drawn = torch.randn(3, rows, columns, generator=generator, dtype=torch.float64)
        found = torch.linalg.svd(drawn, full_matrices=False)
        values = torch.logspace(0, -2, 16, dtype=torch.float64).expand(3, 16)
        matrices = found.U * values[:, None] @ found.Vh
        diagonal = found.U.mT @ orthogonalized(7 * matrices) @ found.Vh.mT
        singular = diagonal.diagonal(dim1=1, dim2=2)
        assert singular.min() > 0.65 and singular.max() < 1.25
        assert torch.allclose(diagonal, torch.diag_embed(singular), atol=1e-10), (rows, columns)


def test_a_step_of_newton_schulz_is_that_of_the_paper() -> None:
    x = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = x / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = expected @ expected.mT
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    assert torch.allclose(orthogonalized(x), expected, atol=1e-10)


def test_each_weight_moves_by_its_rate_toward_the_least_value_of_a_quadratic() -> None:
    """The gradient of |W - A|^2 / 2 is W - A; that of equal singular values is orthogonalized to its directions."""
    orthogonal, _ = torch.linalg.qr(torch.randn(27, 16, generator=torch.Generator().manual_seed(0)))
    goals = [orthogonal.mT.reshape(16, 3, 3, 3), orthogonal.mT.reshape(16, 3, 3, 3) * 4, torch.ones(5)]
    weights = [nn.Parameter(torch.zeros_like(goal)) for goal in goals]
    others = torch.optim.Adam([{"params": weights[2:], "initial_lr": 0.1}], lr=0.1)
    optimizer = Muon(weights[:2], others, learning_rate=0.05)
    distances = []
    for _ in range(15):
        optimizer.zero_grad()
        sum((weight - goal).square().sum() / 2 for weight, goal in zip(weights, goals, strict=True)).backward()
        optimizer.step()
        distances.append([(weight - goal).norm().item() for weight, goal in zip(weights, goals, strict=True)])
    for weight, goal in zip(weights[:2], goals, strict=False):
        along = (weight * goal).sum().item() / goal.norm().item() / 4  # the norm of an orthogonal step is sqrt(16)
        assert 15 * 0.05 * 0.65 < along < 15 * 0.05 * 1.25 and abs(along * 4 - weight.norm().item()) < 1e-3
    assert all(later < sooner for sooner, later in zip(distances[0], distances[-1], strict=True))
    kept = {key for weight in weights for key in optimizer.state[weight]}
    assert kept == {"momentum", "step", "exp_avg", "exp_avg_sq"}
