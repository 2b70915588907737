"""Inpainting: spec oracle 13."""

import math

import pytest
import torch

from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.langevin import annealed_langevin, inpaint

RHO, KNOWN = 0.8, 1.3


def correlated_score(sigmas):
    covariances = torch.tensor([[1.0, RHO], [RHO, 1.0]]) + sigmas.square()[:, None, None] * torch.eye(2)
    precisions = torch.linalg.inv(covariances)
    return lambda x, level: -torch.einsum("bij,bj->bi", precisions[level], x.flatten(1)).view_as(x)


def complete(levels, epsilon, steps, *, count=20_000, **changes):
    sigmas = geometric_sigmas(1.0, 0.01, levels)
    noise = KeyedNoise(0, first=0, count=count, shape=(1, 1, 2))
    return inpaint(
        correlated_score(sigmas),
        x=noise.uniform(0),
        reference=torch.tensor([KNOWN, 99.0]).expand(count, 1, 1, 2),
        mask=torch.tensor([[True, False]]),
        sigmas=sigmas,
        epsilon=epsilon,
        steps_per_level=steps,
        noise=noise,
        **({"denoise": False} | changes),
    )


@pytest.mark.oracle(13)
@pytest.mark.parametrize(
    ("levels", "epsilon", "steps", "mean", "variance", "tolerance"),
    [pytest.param(30, 5e-5, 100, 1.042, 0.359, 0.02, marks=pytest.mark.slow), (10, 2e-5, 100, 1.02, 0.382, 0.03)],
)
def test_conditional_distribution_of_a_gaussian(levels, epsilon, steps, mean, variance, tolerance):
    unknown = complete(levels, epsilon, steps)[:, 0, 0, 1]
    assert unknown.mean().item() == pytest.approx(mean, abs=tolerance)
    assert unknown.var().item() == pytest.approx(variance, abs=tolerance)
    assert unknown.mean().item() == pytest.approx(RHO * KNOWN, abs=0.05)
    assert unknown.var().item() == pytest.approx(1 - RHO**2, abs=0.05)


@pytest.mark.oracle(13)
def test_known_pixels_carry_the_last_noise_until_they_are_restored():
    rough = complete(10, 2e-5, 2, restore=False)[..., 0] - KNOWN
    assert rough.std().item() == pytest.approx(0.01, abs=0.0003) and abs(rough.mean().item()) < 3e-4
    for denoise in (False, True):
        assert complete(10, 2e-5, 2, count=50, denoise=denoise)[..., 0].eq(torch.tensor(KNOWN)).all()


SIGMAS = geometric_sigmas(1.0, 0.01, 4)


def images(mask, *, network=None, **changes):
    noise = KeyedNoise(1, first=0, count=3, shape=(2, 4, 5))
    arguments = {
        "x": noise.uniform(0),
        "reference": noise.uniform(1),
        "mask": mask,
        "sigmas": SIGMAS,
        "epsilon": 2e-5,
        "steps_per_level": 3,
        "noise": noise,
    } | changes
    return inpaint(network or score, **arguments), arguments


def score(x, level):
    return (0.4 - x) / (0.1 + SIGMAS[level].view(-1, 1, 1, 1) ** 2)


@pytest.mark.oracle(13)
@pytest.mark.parametrize("denoise", [False, True])
def test_nothing_known_is_annealed_langevin_bitwise(denoise):
    x, arguments = images(torch.zeros(1, 4, 5, dtype=torch.bool), denoise=denoise)
    plain = {key: arguments[key] for key in ("x", "sigmas", "epsilon", "steps_per_level", "noise")}
    assert torch.equal(x, annealed_langevin(score, denoise=denoise, **plain))


@pytest.mark.oracle(13)
def test_known_pixels_return_and_the_others_of_the_reference_are_not_used():
    mask = torch.arange(20).view(4, 5) % 2 == 0
    x, arguments = images(mask)
    reference = arguments["reference"]
    assert torch.equal(images(mask, reference=torch.where(mask, reference, math.nan))[0], x)
    assert torch.equal(images(torch.ones(4, 5, dtype=torch.bool))[0], reference)


def test_known_pixels_keep_one_noise_through_a_level():
    mask, seen = torch.arange(5).expand(4, 5) < 2, []

    def spying(x, level):
        seen.append((int(level[0]), x[..., :2].clone()))
        return score(x, level)

    _, arguments = images(mask, network=spying, denoise=False)
    # The first evaluation of a level still sees the level before; later ones see reference + sigma z of their own.
    for call, (level, known) in enumerate(seen):
        if call % 3:
            expected = arguments["reference"] + SIGMAS[level] * arguments["noise"](12 + level)
            torch.testing.assert_close(known, expected[..., :2])


@pytest.mark.parametrize("mask", [torch.ones(5, 4, dtype=torch.bool), torch.ones(4, 5)])
def test_masks_of_the_wrong_shape_or_type_are_refused(mask):
    with pytest.raises((ValueError, RuntimeError)):
        images(mask)
