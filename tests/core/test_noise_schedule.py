"""The noise levels."""

from __future__ import annotations

import pytest
import torch

from ncsn.core.noise_schedule import geometric_sigmas


def test_levels_of_the_paper():
    sigmas = geometric_sigmas(1.0, 0.01, 10)
    expected = [1, 0.599484, 0.359381, 0.215443, 0.129155, 0.077426, 0.046416, 0.027826, 0.016681, 0.01]
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == pytest.approx(expected, rel=2e-5)
    torch.testing.assert_close(sigmas[:-1] / sigmas[1:], torch.full((9,), 1.66810), rtol=1e-5, atol=0)


def test_ends_are_exact_over_many_levels():
    sigmas = geometric_sigmas(348.0, 0.01, 2311)
    assert sigmas[0] == 348.0 and sigmas[-1] == torch.tensor(0.01)
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.01, 1.0, 10), "need 0 < sigma_L < sigma_1, got sigma_1 = 0.01 and sigma_L = 1.0"),
        ((1.0, 0.0, 10), "need 0 < sigma_L"),
        ((float("nan"), 0.01, 10), "need 0 < sigma_L"),
        ((1.0, 0.01, 1), "at least 2 levels"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        geometric_sigmas(*arguments)
