"""The numbers of a run in words: scores, hints, the story, the film, the lineage."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn.config.choices import AnnealedLangevinConfig, ProbabilityFlowConfig
from ncsn.core.images import fit_moments
from ncsn.core.noise_schedule import best_epsilon, geometric_sigmas
from ncsn.report.diagnostics import MOST_POINTS, average_hints, linear_loss, sampler_hints, thinned, training_hints
from ncsn.report.images import MOST_PIXEL_BYTES, film
from ncsn.report.page import search_panel, tag_facts
from ncsn.report.words import cost_facts, cost_line, read_figures, score_rows

METRICS = {
    "eval/classifier_score_n512": 8.0,
    "eval/classifier_score_std_n512": 0.25,
    "eval/classifier_kid_n512": 0.5,
    "eval/classifier_class_tv_n512": 0.1,
    "eval/classifier_test_accuracy": 0.97,
}
REAL = {"eval/real_classifier_score_n500": 10.0, "eval/real_classifier_kid_n500": -0.1}


def test_figures_are_read_from_their_names() -> None:
    readings = read_figures(METRICS)
    assert set(readings) == {"score", "score_std", "kid", "class_tv"}
    assert (readings["class_tv"].extractor, readings["class_tv"].num_images) == ("classifier", 512)
    assert read_figures(REAL)["kid"].value == -0.1
    assert read_figures({"eval/custom_graph_fid_n2": 1.0})["fid"].extractor == "custom_graph"


def test_scores_stand_beside_the_real_ones() -> None:
    (score,), (kid, class_tv) = score_rows(METRICS, REAL)
    assert (score.value, score.real, score.better) == ("8 ±\u00a00.25", "10", "higher")
    assert score.share == pytest.approx(0.8 * score.real_share, abs=0.1)
    assert kid.share is None, "a negative figure has no length"
    assert (class_tv.real, class_tv.share) == ("", None)


def test_linear_loss_is_that_of_the_best_linear_denoiser() -> None:
    """By least squares: the noise of normal data, predicted from the noisy data by a matrix."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, 1, 2, 2, generator=generator) * torch.tensor([[[2.0, 1.0], [0.5, 0.1]]])
    sigma = 0.7
    z = torch.randn(x.shape, generator=generator)
    noisy = (x + sigma * z).flatten(1)
    answer = torch.linalg.lstsq(noisy, z.flatten(1)).solution
    residual = float((noisy @ answer - z.flatten(1)).square().mean())
    assert linear_loss(fit_moments(x), [sigma])[0] == pytest.approx(residual, rel=0.02)


def test_levels_that_a_linear_denoiser_beats_are_named() -> None:
    linear, sigmas = np.array([0.1, 0.2, 0.4, 0.8]), [1.0, 0.5, 0.25, 0.125]
    assert training_hints(0.9 * linear, linear=linear, sigmas=sigmas) == []
    assert training_hints(np.full(4, np.nan), linear=linear, sigmas=sigmas) == []
    (hint,) = training_hints(linear * [3.0, 1.2, 1.0, 1.0], linear=linear, sigmas=sigmas)
    assert hint.startswith("Levels 0 to 1 ")
    assert "sigma 1 (0.1 against 0.3)" in hint
    (hint,) = training_hints(linear * [1.0, 1.2, 1.0, 1.2], linear=linear, sigmas=sigmas)
    assert hint.startswith("Levels 1 and 3 ")
    (hint,) = training_hints(linear * [1.0, 1.0, 1.0, 1.2], linear=linear, sigmas=sigmas)
    assert hint.startswith("Level 3 ")


def test_an_epsilon_that_does_not_fit_gets_the_one_that_does() -> None:
    sigmas = geometric_sigmas(1.0, 0.03, 20).tolist()
    best = best_epsilon(sigma_L=sigmas[-1], ratio=sigmas[-2] / sigmas[-1], steps_per_level=10)

    def hints(factor: float) -> list[str]:
        settings = {"kind": "annealed_langevin", "steps_per_level": 10, "epsilon": factor * best}
        return sampler_hints(AnnealedLangevinConfig(**settings), sigmas)

    assert hints(1.0) == []
    for factor, fault in ((8.0, "too large"), (0.05, "too small"), (50.0, "diverges")):
        (hint,) = hints(factor)
        assert fault in hint and f"{best:.2g}" in hint
    assert sampler_hints(ProbabilityFlowConfig(kind="probability_flow"), sigmas) == []


def test_an_average_that_is_mostly_untrained_is_said() -> None:
    settings = SimpleNamespace(ema_decay=0.998, batch_size=64)
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


def test_the_film_has_every_stage_of_small_images_and_few_of_large_ones() -> None:
    small = np.arange(5, dtype=np.uint8).repeat(3 * 8 * 8).reshape(5, 3, 8, 8, 1)
    shown = film(small, sigmas=[1.0, 0.3, 0.1, 0.03])
    assert shown.labels == ["start: noise", "noise 1", "noise 0.3", "noise 0.1", "finished"]
    picture = np.asarray(Image.open(io.BytesIO(shown.frames.content)))
    width, height = shown.size
    assert picture.shape == (5 * height, width) == (5 * 10, 3 * 9 + 1)
    assert [picture[stage * height + 4, 4] for stage in range(5)] == [0, 1, 2, 3, 4]
    large = film(np.zeros((100, 8, 128, 128, 3), np.uint8), sigmas=[1.0])
    assert math.prod(large.size) * 3 * len(large.labels) < 1.1 * MOST_PIXEL_BYTES
    assert len(large.labels) >= 8 and large.labels[1].startswith("stage ")


def test_a_search_says_what_it_won() -> None:
    result = {
        "objective_name": "eval/classifier_fid_n256",
        "objective": 12.0,
        "baseline": 15.5,
        "images_seen": 4096,
        "values": {"optimizer.learning_rate": 0.002},
        "trials": [{"status": status} for status in ("finished", "finished", "stopped", "failed")],
    }
    panel = search_panel(result, [b"\x89PNG"])
    for fact in ("4 trials", " 2 ", "eval/classifier_fid_n256 = 12", "4,096 images", "15.5"):
        assert fact in panel.text
    assert panel.table == [("setting", "best"), ("optimizer.learning_rate", "0.002")]
    assert len(panel.pictures) == 1
    assert "15.5" not in search_panel({**result, "baseline": None}, []).text


def test_costs_stand_beside_the_plan() -> None:
    cost = {"seconds": 360.0, "cpu_hours": 0.2, "gpu_hours": 0.0, "money": 0.009, "kwh": 0.0016}
    ledger = {
        "plan": {"total": {**cost, "seconds": 300.0}},
        "actual": {"steps": {"sample": cost}, "total": cost},
        "prices": {"currency": "USD"},
    }
    taken, planned, thousand = cost_facts(ledger, num_images=500)
    assert (taken.label, taken.value) == ("Taken", "6.0 min · 0.2 CPU hours · 0.009 USD · 0.0016 kWh")
    assert planned.value.startswith("5.0 min")
    assert (thousand.label, thousand.value.split(" · ")[0]) == ("Per 1,000 images", "12.0 min")
    assert cost_line(ledger) == taken.value
    nothing = {**ledger, "plan": None, "actual": {"steps": {}, "total": cost}}
    assert (cost_line(nothing), list(cost_facts(nothing, num_images=500))) == ("", [])


def test_lineage_names_each_value_once_and_links_pages_only() -> None:
    whole = {"kfp.pipeline_run_id": "1", "kfp.pipeline_run_url": "javascript:alert(1)", "torch.version": "2.6"}
    steps = [{"ray.job_id": "01", "torch.version": "2.6"}, {"ray.job_id": "02", "torch.version": "2.7"}]
    facts = {fact.label: fact for fact in tag_facts([whole, *steps])}
    assert facts["Ray job"].value == "01, 02"
    assert facts["Versions"].value == "torch 2.6, 2.7"
    assert (facts["KFP run"].value, facts["KFP run"].link) == ("1", "")
    linked = tag_facts([{**whole, "kfp.pipeline_run_url": "https://kfp.example/runs/1"}])
    assert linked[0].link == "https://kfp.example/runs/1"
