"""Which levels a sampler visits."""

from __future__ import annotations

import pytest
import torch

from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.level_grid import choose_levels, spaced_sigmas


def karras(first: float, last: float, count: int) -> list[float]:
    return spaced_sigmas(torch.tensor([first, last], dtype=torch.float64), count, spacing="karras")


V2 = geometric_sigmas(50.0, 0.01, 232)


def test_all_levels_unless_fewer_are_asked_for():
    assert choose_levels(V2, None) == choose_levels(V2, 232) == choose_levels(V2, 500) == list(range(232))


@pytest.mark.parametrize("count", [2, 3, 30, 117, 231])
def test_geometric_subset_is_even_and_has_both_ends(count):
    indices = choose_levels(V2, count)
    assert len(indices) == count and indices[0] == 0 and indices[-1] == 231
    exact = [k * 231 / (count - 1) for k in range(count)]
    assert max(abs(i - e) for i, e in zip(indices, exact, strict=True)) <= 0.5001
    assert indices == sorted(set(indices))


def test_geometric_subset_of_uneven_levels_has_no_duplicates():
    sigmas = torch.tensor([10.0, 9.9, 9.8, 9.7, 0.02, 0.01])
    for count in range(2, 7):
        indices = choose_levels(sigmas, count)
        assert len(set(indices)) == count and indices == sorted(indices) and indices[0] == 0 and indices[-1] == 5


def test_karras_grid():
    grid = karras(80.0, 0.002, 18)
    assert grid[0] == 80.0 and grid[-1] == 0.002 and len(grid) == 18
    # Worked by hand: (80^(1/7) + (0.002^(1/7) - 80^(1/7)) / 17)^7 = 57.586.
    assert grid[1] == pytest.approx(57.586, abs=1e-3)
    with pytest.raises(ValueError, match=r"steps.*\b1\b"):
        karras(1.0, 0.1, 1)


def test_karras_subset_moves_to_trained_levels_and_drops_duplicates():
    few = geometric_sigmas(1.0, 0.01, 10)
    indices = choose_levels(few, 9, spacing="karras")
    assert indices == sorted(set(indices)) and indices[0] == 0 and indices[-1] == 9
    many = choose_levels(V2, 18, spacing="karras")
    for index, sigma in zip(many, karras(50.0, 0.01, 18), strict=True):
        assert V2[index].item() == pytest.approx(sigma, rel=0.02)


def test_one_level_is_too_few():
    with pytest.raises(ValueError, match="num_levels = 1"):
        choose_levels(V2, 1)
