"""Scores, costs and lineage in words, and hints; tests look at numbers and keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ncsn.config.training import DecayEmaConfig, TrainConfig
from ncsn.core.images import fit_moments
from ncsn.core.noise_schedule import best_epsilon, geometric_sigmas
from ncsn.core.samplers.settings import AnnealedLangevin, KarrasHeun
from ncsn.report.diagnostics import (
    MOST_POINTS,
    average_hints,
    linear_loss,
    sampler_hints,
    search_section,
    thinned,
    training_hints,
)
from ncsn.report.facts import cost_facts, cost_line, tag_facts
from ncsn.report.words import read_metrics, score_rows
from ncsn.runs.costs import Cost

METRICS = {
    "eval/classifier_score_n512": 8.0,
    "eval/classifier_score_std_n512": 0.25,
    "eval/classifier_kid_n512": 0.5,
    "eval/classifier_class_tv_n512": 0.1,
    "eval/classifier_test_accuracy": 0.97,
}
REAL = {"eval/real_classifier_score_n500": 10.0, "eval/real_classifier_kid_n500": -0.1}


def test_metrics_are_read_from_their_names() -> None:
    readings = read_metrics(METRICS)
    assert set(readings) == {"score", "score_std", "kid", "class_tv"}
    assert (readings["class_tv"].extractor, readings["class_tv"].num_images) == ("classifier", 512)
    assert read_metrics(REAL)["kid"].value == -0.1
    assert read_metrics({"eval/custom_graph_fid_n2": 1.0})["fid"].extractor == "custom_graph"


def test_scores_are_next_to_the_real_ones() -> None:
    (score,), (kid, class_tv) = score_rows(METRICS, REAL)
    assert (score.value, score.real, score.better) == ("8 ±\u00a00.25", "10", "higher")
    assert score.share == pytest.approx(0.8 * score.real_share, abs=0.1)
    assert kid.share is None, "a negative number has no bar"
    assert (class_tv.real, class_tv.share) == ("", None)


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
        ([3.0, 1.2, 1.0, 1.0], ["Bins 0 to 1 "]),
        ([1.0, 1.2, 1.0, 1.2], ["Bins 1 and 3 "]),
        ([1.0, 1.0, 1.0, 1.2], ["Bin 3 "]),
    ],
)
def test_levels_that_a_linear_denoiser_beats_are_named(factors: list[float], hints: list[str]) -> None:
    linear = np.array([0.1, 0.2, 0.4, 0.8])
    found = training_hints(linear * factors, linear=linear, sigmas=[1.0, 0.5, 0.25, 0.125])
    assert [hint[: len(start)] for hint, start in zip(found, hints, strict=True)] == hints
    if factors[0] == 3.0:
        assert "sigma 1 (0.1 versus 0.3)" in found[0]


def test_an_epsilon_that_does_not_fit_gets_the_one_that_does() -> None:
    sigmas = geometric_sigmas(1.0, 0.03, 20).tolist()
    best = best_epsilon(sigma_L=sigmas[-1], ratio=sigmas[-2] / sigmas[-1], steps_per_level=10)

    def hints(factor: float) -> list[str]:
        settings = {"kind": "annealed_langevin", "steps_per_level": 10, "epsilon": factor * best}
        return sampler_hints(AnnealedLangevin(**settings), sigmas)

    assert hints(1.0) == []
    for factor, fault in ((8.0, "large"), (0.05, "small"), (50.0, "diverges")):
        (hint,) = hints(factor)
        assert fault in hint and f"{best:.2g}" in hint
    assert sampler_hints(KarrasHeun(), sigmas) == []


def test_an_average_with_much_of_the_initial_weights_is_a_hint() -> None:
    settings = TrainConfig(
        batch_size=64,
        num_images=640,
        ema=DecayEmaConfig(kind="decay", per_step=0.998),
        checkpoint_every_images=640,
        report_every_images=640,
    )
    assert average_hints(settings, images_seen=140_032) == []
    (hint,) = average_hints(settings, images_seen=20_032)
    assert f"{0.998**313:.0%}" in hint


def test_long_curves_are_thinned_to_means() -> None:
    seen, losses = np.arange(1.0, 1001.0), np.full((1000, 2), 0.5)
    losses[::2, 0], losses[1::2, 0] = 0.0, 1.0
    losses[:, 1] = np.nan
    places, means = thinned(seen, losses)
    assert len(places) == len(means) == MOST_POINTS and places[-1] == 1000
    assert means[:, 0] == pytest.approx(0.5, abs=0.08)
    assert np.isnan(means[:, 1]).all()
    few, same = thinned(seen[:3], losses[:3])
    assert few.tolist() == [1, 2, 3] and same[:, 0].tolist() == [0, 1, 0]


def test_a_search_shows_what_it_gained() -> None:
    result = {
        "objective_name": "eval/classifier_fid_n256",
        "objective": 12.0,
        "baseline": 15.5,
        "images_seen": 4096,
        "values": {"optimizer.learning_rate": 0.002},
        "trials": [{"status": status} for status in ("finished", "finished", "stopped", "failed")],
    }
    section = search_section(result, [b"\x89PNG"])
    for fact in ("4 trials", " 2 ", "eval/classifier_fid_n256 = 12", "4,096 images", "15.5"):
        assert fact in section.text
    assert section.table == [("setting", "best"), ("optimizer.learning_rate", "0.002")]
    assert len(section.pictures) == 1
    assert "15.5" not in search_section({**result, "baseline": None}, []).text


def test_costs_are_summed_and_scaled() -> None:
    spent = {step: Cost(360.0, 0.2, 0.0) for step in ("train", "sample")}
    whole, thousand = cost_facts(spent, num_images=500)
    assert whole.value == cost_line(spent) == "12.0 min · 0.4 CPU hours"
    assert thousand.value == "12.0 min · 0.4 CPU hours"
    assert (cost_line({}), list(cost_facts({}, num_images=500))) == ("", [])


def test_lineage_has_each_value_once_and_links_pages_only() -> None:
    whole = {"kfp.pipeline_run_id": "1", "kfp.pipeline_run_url": "javascript:alert(1)", "torch.version": "2.6"}
    steps = [{"ray.job_id": "01", "torch.version": "2.6"}, {"ray.job_id": "02", "torch.version": "2.7"}]
    facts = {fact.label: fact for fact in tag_facts([whole, *steps])}
    assert facts["Ray job"].value == "01, 02"
    assert facts["Versions"].value == "torch 2.6, 2.7"
    assert (facts["KFP run"].value, facts["KFP run"].link) == ("1", "")
    linked = tag_facts([{**whole, "kfp.pipeline_run_url": "https://kfp.example/runs/1"}])
    assert linked[0].link == "https://kfp.example/runs/1"
