"""Scores next to those of real images, costs, lineage, and hints where a run went wrong, as all pages have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gated import audited

from ncsn.config.training import DecayEmaConfig, TrainConfig
from ncsn.core.images import fit_moments
from ncsn.core.noise_schedule import best_epsilon, geometric_sigmas
from ncsn.core.samplers.settings import AnnealedLangevin, KarrasHeun
from ncsn.evaluation.copies import Copies
from ncsn.report.hints import (
    average_hints,
    copying_hints,
    held_out_conclusion,
    linear_loss,
    overfitting_hints,
    sampler_hints,
    training_hints,
)
from ncsn.report.words import (
    CLOSE,
    FAR,
    cost_facts,
    cost_line,
    score_rows,
    slowdown,
    tag_facts,
    takes,
    verdict_of,
)
from ncsn.runs.history import HeldOutCurves
from ncsn.runs.metrics import with_interval
from ncsn.runs.record import Cost

EVALUATION = {
    "metrics": {
        "eval/classifier_score_n512": 8.0,
        "eval/classifier_score_std_n512": 0.25,
        "eval/classifier_kid_n512": 0.5,
        "eval/classifier_kid_low_n512": -0.1,
        "eval/classifier_kid_high_n512": 1.1,
        "eval/classifier_class_tv_n512": 0.1,
        "eval/classifier_test_accuracy": 0.97,
    },
    "real_metrics": {"eval/real_classifier_score_n500": 10.0, "eval/real_classifier_kid_n500": 0.3},
}


def test_scores_are_next_to_the_real_ones() -> None:
    score, kid, class_tv = score_rows(EVALUATION)
    assert (score.text, score.real_text, score.meaning.better) == ("8", "10 of 500", "higher")
    bars = score.bars
    assert (bars["bar"], bars["real"], bars["axis"]) == ([0.0, 80.0], [100.0], [(0.0, "0"), (100.0, "10")])
    assert (class_tv.name, class_tv.text) == ("eval/classifier_class_tv_n512", "0.1")
    assert (class_tv.real_text, class_tv.bars["real"]) == ("", [])
    assert kid.bars["axis"] == [(0.0, "-0.5"), (25.0, "0"), (100.0, "1.5")] and kid.bars["bar"] == [25.0, 50.0]
    assert (kid.bars["interval"], kid.bars["real"]) == ([20.0, 80.0], [40.0])
    assert (kid.text, kid.real_text) == ("0.50 (-0.10 to 1.1)", "0.3 of 500")
    (negative,) = score_rows({"metrics": {"eval/dinov2_vs_test_kid_n5": -1.0}, "real_metrics": {}})
    assert (negative.text, negative.bars["bar"]) == ("-1", [0.0, 100.0]) and "the test images" in negative.meaning.text


@pytest.mark.parametrize(
    ("excess", "copies", "grade"),
    [
        ((0.0, -0.9 * CLOSE, 0.9 * CLOSE), 5, "close"),
        ((0.5 * CLOSE, 0.1 * CLOSE, 0.9 * CLOSE), 5, "close"),  # it is surely not zero, and surely close
        ((0.6 * CLOSE, 0.1 * CLOSE, 1.1 * CLOSE), 5, "short"),
        ((2 * FAR, 0.9 * FAR, 3 * FAR), 5, "short"),
        ((2 * FAR, 1.1 * FAR, 3 * FAR), 5, "far"),
        ((0.3, -0.1, 0.7), 5, "unsure"),
        ((0.0, -0.9 * CLOSE, 0.9 * CLOSE), 40, "copied"),
    ],
)
def test_a_verdict_is_by_the_whole_interval_and_shows_equal_numbers(excess, copies: int, grade: str) -> None:
    numbers = dict(zip(("excess", "excess_low", "excess_high"), excess, strict=True))
    made = {f"eval/clusters_{name}_n1024": value for name, value in numbers.items()}
    made |= {"eval/clusters_fid_n1024": 61.5, "eval/clusters_fid_n200": 92.9}
    counted = Copies(copies, 1024, 200, 0)
    found, text = verdict_of(made, {"eval/real_clusters_fid_n200": 56.7}, copies=counted)
    assert found == grade
    assert all(part in text for part in ("1,024", " 200 ", "92.9", "56.7", str(counted))) and "61.5" not in text
    assert with_interval(*(100 * each for each in excess)) in text
    _, row = score_rows({"metrics": made, "real_metrics": {"eval/real_clusters_fid_n200": 56.7}})
    assert (row.name, row.value, row.real) == ("eval/clusters_fid_n200", 92.9, 56.7)


def test_costs_are_summed_and_scaled() -> None:
    spent = {step: Cost(360.0, 0.2, 0.0) for step in ("train", "sample")}
    whole, thousand = cost_facts(spent, num_images=500)
    assert whole.value == thousand.value == "12.0 min · 24.0 min of CPU cores"
    assert cost_line([Cost(7200.0, 400.0, 2.0)]) == "2.0 h · 16.7 days of CPU cores · 2.0 h of GPUs"
    assert (cost_line([]), list(cost_facts({}, num_images=500))) == ("", [])


def test_lineage_has_each_value_once_and_links_pages_only() -> None:
    whole = {"kfp.pipeline_run_id": "1", "kfp.pipeline_run_url": "javascript:alert(1)", "torch.version": "2.6"}
    steps = [{"ray.job_id": "01", "torch.version": "2.6"}, {"ray.job_id": "02", "torch.version": "2.7"}]
    facts = {fact.label: fact for fact in tag_facts([whole, *steps])}
    assert facts["Ray job"].value == "01, 02"
    assert facts["Versions"].value == "torch 2.6, 2.7"
    assert (facts["KFP run"].value, facts["KFP run"].link) == ("1", "")
    linked = tag_facts([{**whole, "kfp.pipeline_run_url": "https://kfp.example/runs/1"}])
    assert linked[0].link == "https://kfp.example/runs/1"


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
    [([0.9, 0.9, 0.9, 0.9], []), ([np.nan] * 4, []), ([1.0, 1.2, 1.0, 1.2], ["Undertrained at sigma 0.5, 0.125:"])],
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


def test_copies_closeness_and_near_duplicates_are_warnings() -> None:
    assert copying_hints(audited(copies=5, low=0.5)) == []
    (copied,) = copying_hints(audited(copies=12))
    (close,) = copying_hints(audited(low=0.51))
    (near,) = copying_hints(audited(near_duplicates=7))
    assert " 12 " in copied and near.startswith("7 ") and "75.0%" in close and "50.0%" in close
    assert copying_hints(audited(12, low=0.51, near_duplicates=7)) == [copied, close, near]


def test_an_estimate_for_idle_cores_is_told_beside_that_for_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("time.process_time", lambda: 30.0)  # half of a core, of the last minute
    for load, cores, times in ((0.0, 4, 1), (0.5, 4, 1), (2.5, 2, 1), (2.5, 4, 1.5), (8.5, 4, 3), (8.5, 2, 2.5)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert slowdown(cores) == times
    assert "7.0 min" in takes(420, times=5) and "35.0 min" in takes(420, times=5)
    assert takes(420, times=1.1).count("min") == 1
