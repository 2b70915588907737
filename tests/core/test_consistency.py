"""Consistency tuning and its sampler on Gaussian data, whose consistency function is known (oracle 24)."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_networks import shaken, unet

from ncsn.core.consistency import ConsistencyTuning, PairSchedule, Teacher
from ncsn.core.losses import Batch, DenoisingScoreMatching
from ncsn.core.networks.layers import image_keys
from ncsn.core.samplers.chain import sample
from ncsn.core.samplers.settings import Consistency

M, S = 0.4, 0.3


def per_pixel(values):
    return values.view(-1, 1, 1, 1)


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(x, *, sigma, dropout_keys=None):
    """The network whose denoised images are the consistency function of N(M, S^2)."""
    t = per_pixel(sigma)
    return (M + (x - M) * S / (S**2 + t**2).sqrt() - x) / t**2


def pairs(count=6, *, size=4, seed=0):
    t = torch.logspace(-2, 1, count, dtype=torch.float64)
    x, z = M + S * draws(count, 1, size, size, seed=seed), draws(count, 1, size, size, seed=seed + 1)
    return Batch(x, t, z, lower=t * torch.linspace(0, 0.9, count, dtype=torch.float64))


def single(batch):
    """In float32."""
    return replace(batch, **{name: getattr(batch, name).float() for name in ("x", "sigma", "z", "lower")})


@pytest.mark.oracle(24)
def test_two_points_of_one_trajectory_have_no_loss_and_two_of_one_noise_have():
    batch = pairs()
    t, r = per_pixel(batch.sigma), per_pixel(batch.lower)
    high, low = (S**2 + t**2).sqrt(), (S**2 + r**2).sqrt()
    along = replace(batch, z=(batch.x - M) * (high - low) / (t * low - r * high))
    assert ConsistencyTuning()(exact, along).per_image.max() < 1e-20
    distance = S * ((batch.x + t * batch.z - M) / high - (batch.x + r * batch.z - M) / low)
    squared, apart = distance.square().flatten(1).sum(1), (t - r).flatten()
    found = ConsistencyTuning()(exact, batch)
    torch.testing.assert_close(found.per_image, squared / apart**2 / 16)
    torch.testing.assert_close(found.loss, (squared.sqrt() / apart).mean())


def test_where_r_is_zero_it_is_score_matching():
    batch, network = pairs(), lambda x, *, sigma, dropout_keys=None: torch.sin(5 * x) / per_pixel(sigma)
    found = ConsistencyTuning()(network, replace(batch, lower=torch.zeros_like(batch.sigma)))
    dsm = DenoisingScoreMatching()(network, batch)
    torch.testing.assert_close(found.per_image, dsm.per_image, rtol=1e-12, atol=0)


def test_a_zero_network_reads_one():
    found = ConsistencyTuning()(lambda x, **_: torch.zeros_like(x), pairs(size=64)).per_image
    assert found.tolist() == pytest.approx([1] * 6, abs=0.07)


def test_the_gradient_is_that_of_the_first_term_alone():
    batch, theta = pairs(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def loss(value):
        def network(x, *, sigma, dropout_keys=None):
            assert (dropout_keys is None) == torch.is_grad_enabled()
            weight = value if dropout_keys is None else torch.tensor(0.7, dtype=torch.float64)
            return torch.tanh(weight * x) / per_pixel(sigma)

        return ConsistencyTuning()(network, batch).loss

    (found,) = torch.autograd.grad(loss(theta), theta)
    with torch.enable_grad():
        numeric = (loss(theta.detach() + 1e-6) - loss(theta.detach() - 1e-6)).item() / 2e-6
    assert found.item() == pytest.approx(numeric, rel=1e-6) and abs(numeric) > 0.01
    same = replace(batch, z=torch.zeros_like(batch.x))
    (none,) = torch.autograd.grad(ConsistencyTuning()(lambda x, **_: x * theta * 0, same).loss, theta)
    assert none == 0, "the norm has no slope at 0"


def test_both_terms_have_the_same_dropout():
    network, near = shaken(unet(dropout=0.5)).train(), single(pairs(size=8))
    near = replace(near, lower=0.999 * near.sigma)

    def strangers(x, *, sigma, dropout_keys=None):
        return network(x, sigma=sigma)

    same, others = (ConsistencyTuning()(each, near).per_image for each in (network, strangers))
    assert (others > 100 * same).all()
    x, sigma = near.x, near.sigma
    assert torch.equal(network(x, sigma=sigma), network(x, sigma=sigma, dropout_keys=image_keys(x)))


def test_a_cpu_computes_no_score_where_r_is_zero():
    network, near, counts = shaken(unet(dropout=0.5)).train(), single(pairs(size=8)), []

    def counted(x, **inputs):
        counts.append(len(x))
        return network(x, **inputs)

    for compared in ([1, 0, 0, 1, 1, 0], [0] * 6):
        batch = replace(near, lower=0.9 * near.sigma * torch.tensor(compared))
        found, whole = (ConsistencyTuning(compiled=each)(counted, batch) for each in (False, True))
        torch.testing.assert_close(found.per_image, whole.per_image)
    assert counts == [3, 6, 6, 6, 6, 6, 6]


@pytest.mark.oracle(24)
def test_pairs_of_a_teacher_are_on_one_trajectory():
    """The distance of a pair is the error of Euler's step, of second order, where the network is exact."""
    batch, found = pairs(), []

    def score(x, *, sigma):
        return (M - x) / (S**2 + per_pixel(sigma) ** 2)

    for share in (0.99, 0.999):
        near = replace(batch, lower=share * batch.sigma)
        found.append(ConsistencyTuning(teacher=Teacher(score))(exact, near).per_image)
        assert (ConsistencyTuning()(exact, near).per_image > 30 * found[-1]).all()
    torch.testing.assert_close(found[1], found[0] / 100, rtol=0.05, atol=0)


def test_a_pair_is_on_the_trajectory_of_the_guided_flow():
    """Of a point mass at x for its class, and at M for all images."""
    batch, weight, seen = replace(pairs(), conditions={"labels": torch.tensor([0, 1, 2, 0, -1, 1])}), 1.7, []
    band = (0.5 * float(batch.sigma[0] + batch.sigma[1]), float(batch.sigma[-1]))

    def teacher(noisy, *, sigma, labels):
        denoised = torch.where(per_pixel(labels) >= 0, batch.x, torch.full_like(batch.x, M))
        return (denoised - noisy) / per_pixel(sigma) ** 2

    def network(x, **inputs):
        seen.append(x)
        return torch.zeros_like(x)

    loss = ConsistencyTuning(teacher=Teacher(teacher, weight, band))(network, batch)
    low, high = seen
    weights = torch.tensor([1, weight, weight, weight, 0, weight], dtype=torch.float64)  # the first is below the band
    denoised = M + per_pixel(weights) * (batch.x - M)
    t, r = per_pixel(batch.sigma), per_pixel(batch.lower)
    lower = high + (r - t) * (high - denoised) / t
    torch.testing.assert_close(low, lower[1:])  # the first is at r = 0
    expected = ((high - lower) / (t - r)).square().flatten(1).mean(1)  # D of a zero network is what it is given
    torch.testing.assert_close(loss.per_image, expected)


def test_levels_of_the_stages():
    schedule = PairSchedule(q=4, stages=2, num_images=8, sigma_data=0.5)
    n = 1 + 8 / (1 + math.e)  # at t = 1
    t = torch.ones(12, dtype=torch.float64)
    assert schedule.lower(t, first=0).tolist() == pytest.approx([1 - n / 4] * 4 + [1 - n / 16] * 8, rel=1e-12)
    assert schedule.lower(t[:3], first=3).equal(schedule.lower(t, first=0)[3:6]), "a function of the image's place"
    assert schedule.lower(t).tolist() == pytest.approx([1 - n / 4] * 6 + [1 - n / 16] * 6, rel=1e-12)
    # Near t = 0 n is 5, so r is 0 in the first stage; far above it n is 1. In another unit the same.
    ends = torch.tensor([0.01, 100.0])
    assert schedule.lower(ends, first=0).tolist() == pytest.approx([0, 75])
    half = PairSchedule(q=4, stages=2, num_images=8, sigma_data=0.25)
    assert half.lower(ends / 2).tolist() == pytest.approx((schedule.lower(ends) / 2).tolist())


@pytest.mark.oracle(24)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_number_of_evaluations_of_the_consistency_function_gives_the_distribution(steps, analytic):
    added = Consistency(steps=steps).placed(0.25)
    noise, sampler, seen = analytic.UnitNoise(steps), Consistency(steps=steps, sigmas=added), []
    x = sample(
        sampler,
        lambda x, sigma: exact(x, sigma=sigma),
        x=M + noise.start(math.hypot(S, 3.0)),
        sigmas=torch.tensor([3.0, 0.01], dtype=torch.float64),
        noise=noise,
        on_level=lambda k, state: seen.append((state - M).square().sum().item()),
    )
    assert (x - M).square().sum().item() == pytest.approx(S**2, rel=1e-12)
    assert noise.asked == list(range(steps - 1))
    assert len(seen) == steps and seen[:-1] == pytest.approx([S**2] * (steps - 1)), "what each evaluation makes"
    kept = S * math.prod(S / math.hypot(S, each) for each in added)  # later noise takes the place of the start
    assert (x - M).flatten()[0].item() == pytest.approx(kept, rel=1e-12)


def test_automatic_levels_are_those_of_the_paper_in_the_units_of_the_images():
    assert Consistency().placed(0.25) == pytest.approx((0.4105,))  # 0.821 in [-1, 1]
    assert Consistency(steps=3).placed(0.5) == pytest.approx((0.821, 0.4105))
    assert Consistency(steps=1).placed(0.5) == ()
    assert Consistency(sigmas=[0.3]).sigmas == (0.3,)
    assert Consistency(steps=3, sigmas=(2.0, 0.5)).placed(0.5) == (2.0, 0.5)
