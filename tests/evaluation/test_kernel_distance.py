"""Known values of the kernel distance (spec, oracle 20)."""

import numpy as np
import pytest

from ncsn.evaluation.scores import kernel_distance, squared_mmd


@pytest.mark.oracle(20)
def test_equal_laws_have_mean_zero() -> None:
    rng = np.random.default_rng(0)
    estimates = [squared_mmd(rng.standard_normal((500, 64)), rng.standard_normal((500, 64))) for _ in range(50)]
    error = np.std(estimates, ddof=1) / np.sqrt(50)
    assert error == pytest.approx(0.0003, abs=0.0002)
    assert abs(np.mean(estimates)) < 4 * error
    assert min(estimates) < 0


def test_two_points_each_by_hand() -> None:
    # D = 1, k = (xy + 1)^3: within x k(0,1) = 1, within y k(1,2) = 27, across the mean of 1, 1, 8, 27.
    x, y = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    assert squared_mmd(x, y) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4, abs=1e-12)
    assert kernel_distance(x, y).mean == pytest.approx(squared_mmd(x, y), abs=1e-12)


def test_shifted_gaussians_have_the_analytic_distance() -> None:
    """D = 1: E k(x, x') over independent draws of N(m, 1) and N(n, 1) is a polynomial in their moments."""

    def expected_kernel(m: float, n: float) -> float:
        def moments(mean: float) -> tuple[float, float, float]:
            return mean, mean**2 + 1, mean**3 + 3 * mean

        first, second, third = (one * other for one, other in zip(moments(m), moments(n), strict=True))
        return third + 3 * second + 3 * first + 1

    expected = expected_kernel(0, 0) + expected_kernel(1, 1) - 2 * expected_kernel(0, 1)
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((20_000, 1)), 1 + rng.standard_normal((20_000, 1))
    measured = kernel_distance(a, b, num_subsets=20)
    assert measured.mean == pytest.approx(expected, rel=0.05)


def test_subsets_are_a_function_of_the_seed_and_no_larger_than_the_sets() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((300, 4)), rng.standard_normal((500, 4)) + 1
    assert kernel_distance(a, b, subset_size=100) == kernel_distance(a, b, subset_size=100)
    assert kernel_distance(a, b, subset_size=100, seed=1) != kernel_distance(a, b, subset_size=100)
    assert kernel_distance(a, b, subset_size=1000) == kernel_distance(a, b, subset_size=300)
    assert kernel_distance(a, b, subset_size=100).std > 0


def test_bad_features_are_refused() -> None:
    good = np.zeros((5, 4))
    with pytest.raises(ValueError, match=r"got \[5, 4\] and \[5, 3\]"):
        kernel_distance(good, np.zeros((5, 3)))
    with pytest.raises(ValueError, match="100 subsets"):
        kernel_distance(good, good[:1])
    with pytest.raises(ValueError, match="NaN"):
        kernel_distance(good, np.full((5, 4), np.nan))
