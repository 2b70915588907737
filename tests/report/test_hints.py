"""Hints tell where a run went wrong; tests look at numbers and keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ncsn.config.training import DecayEmaConfig, TrainConfig
from ncsn.core.images import fit_moments
from ncsn.core.noise_schedule import best_epsilon, geometric_sigmas
from ncsn.core.samplers.settings import AnnealedLangevin, KarrasHeun
from ncsn.report.hints import (
    NEAR,
    average_hints,
    copying_hints,
    held_out_conclusion,
    linear_loss,
    overfitting_hints,
    sampler_hints,
    training_hints,
)
from ncsn.report.words import read_metrics
from ncsn.runs.history import HeldOutCurves


def test_linear_loss_is_that_of_the_best_linear_denoiser() -> None:
    """Oracle: least squares predicts the noise of normal data from the noisy data by a matrix."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, 1, 2, 2, generator=generator) * torch.tensor([[[2.0, 1.0], [0.5, 0.1]]])
    sigma = 0.7
    z = torch.randn(x.shape, generator=generator)
    noisy = (x + sigma * z).flatten(1)
    answer = torch.linalg.lstsq(noisy, z.flatten(1)).solution
    residual = float((noisy @ answer - z.flatten(1)).square().mean())
    assert linear_loss(fit_moments(x), [sigma])[0] == pytest.approx(residual, rel=0.02)


@pytest.mark.parametrize(
    ("factors", "hints"),
    [
        ([0.9, 0.9, 0.9, 0.9], []),
        ([np.nan] * 4, []),
        ([1.0, 1.2, 1.0, 1.2], ["Undertrained at sigma 0.5, 0.125:"]),
    ],
)
def test_levels_that_a_linear_denoiser_beats_are_named(factors: list[float], hints: list[str]) -> None:
    linear = np.array([0.1, 0.2, 0.4, 0.8])
    losses = np.stack([linear * factors, np.full(4, np.nan)])  # the last known ones count
    found = training_hints(losses, linear=linear, sigmas=[1.0, 0.5, 0.25, 0.125])
    assert [hint[: len(start)] for hint, start in zip(found, hints, strict=True)] == hints


def test_an_epsilon_that_does_not_fit_gets_the_one_that_does() -> None:
    sigmas = geometric_sigmas(1.0, 0.03, 20).tolist()
    best = best_epsilon(sigma_L=sigmas[-1], ratio=sigmas[-2] / sigmas[-1], steps_per_level=10)

    def hints(factor: float) -> list[str]:
        return sampler_hints(AnnealedLangevin(steps_per_level=10, epsilon=factor * best), sigmas)

    assert hints(1.0) == []
    for factor, fault in ((8.0, "large"), (0.05, "small"), (50.0, "diverges")):
        (hint,) = hints(factor)
        assert fault in hint and f"{best:.2g}" in hint
    assert sampler_hints(KarrasHeun(), sigmas) == []


def test_an_average_with_much_of_the_initial_weights_is_a_hint() -> None:
    every = dict.fromkeys(("num_images", "checkpoint_every_images", "report_every_images"), 640)
    settings = TrainConfig(batch_size=64, ema=DecayEmaConfig(kind="decay", per_step=0.998), **every)
    assert average_hints(settings, images_seen=140_032) == []
    (hint,) = average_hints(settings, images_seen=20_032)
    assert f"{0.998**313:.0%}" in hint


@pytest.mark.parametrize(
    ("loss", "gap", "said"),
    [
        ([0.5, 0.4, 0.6], [0.0, 0.1, 0.2], ["risen since 200"]),
        ([0.5, 0.4, 0.4], [0.0, 0.01, 0.03], ["grew from 0.01 to 0.03", "begins"]),
        ([0.5, 0.4, 0.39], [0.0, 0.01, 0.03], ["grew from 0.01 to 0.03", "not memorize"]),
        ([0.5, 0.4, 0.3], [0.0, 0.01, 0.012], ["neither"]),
        ([0.5, 0.4], [0.0, 0.001], [""]),
    ],
)
def test_the_held_out_curves_have_a_conclusion(loss: list[float], gap: list[float], said: list[str]) -> None:
    seen = 100.0 * np.arange(1, len(loss) + 1)
    curves = HeldOutCurves(seen, np.array(loss), np.array(gap))
    found, hints = held_out_conclusion(curves), overfitting_hints(curves)
    assert all(part in found for part in said) and bool(found) == bool(said[0])
    assert ["lowest at 200 images" in hint for hint in hints] == [True] * ("risen" in found)


def test_copies_and_nearness_are_warnings() -> None:
    def figures(distance: float, real: str = "") -> dict:
        return read_metrics({f"eval/{real}classifier_nn_distance_n256": distance})

    real, copies = figures(300.0, "real_"), "12 of 256 samples copy a training image"
    assert copying_hints(figures(290.0), real, copies="") == []
    assert copying_hints({}, real, copies="") == copying_hints(figures(0.0), {}, copies="") == []
    (copied,) = copying_hints(figures(290.0), real, copies=copies)
    assert copies in copied
    (near,) = copying_hints(figures(300 * NEAR - 1), real, copies="")
    assert "209" in near and "300" in near
    assert len(copying_hints(figures(0.0), real, copies=copies)) == 2
