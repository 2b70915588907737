"""Scores next to those of real images, costs and lineage, as all pages show them."""

from __future__ import annotations

import pytest

from ncsn.evaluation import with_interval
from ncsn.report.words import (
    CLOSE,
    FAR,
    cost_facts,
    cost_line,
    score_rows,
    tag_facts,
    verdict_of,
)
from ncsn.runs.folder import Cost

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
        ((0.0, -0.9 * CLOSE, 0.9 * CLOSE), "", "close"),
        ((0.5 * CLOSE, 0.1 * CLOSE, 0.9 * CLOSE), "", "close"),  # it is surely not zero, and surely close
        ((0.6 * CLOSE, 0.1 * CLOSE, 1.1 * CLOSE), "", "short"),
        ((2 * FAR, 0.9 * FAR, 3 * FAR), "", "short"),
        ((2 * FAR, 1.1 * FAR, 3 * FAR), "", "far"),
        ((0.3, -0.1, 0.7), "", "unsure"),
        ((0.0, -0.9 * CLOSE, 0.9 * CLOSE), "40 of 256 samples copy a training image", "copied"),
    ],
)
def test_a_verdict_is_by_the_whole_interval_and_shows_equal_numbers(excess, copies: str, grade: str) -> None:
    numbers = dict(zip(("excess", "excess_low", "excess_high"), excess, strict=True))
    made = {f"eval/clusters_{name}_n1024": value for name, value in numbers.items()}
    made |= {"eval/clusters_fid_n1024": 61.5, "eval/clusters_fid_n200": 92.9}
    found, text = verdict_of(made, {"eval/real_clusters_fid_n200": 56.7}, copies=copies)
    assert found == grade
    assert all(part in text for part in ("1,024", " 200 ", "92.9", "56.7")) and "61.5" not in text
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
