"""The gate's decision: what compares with what, how much is better, how many copies are too many."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from gated import CLEAN, COPIES, evidence, figure

from ncsn.tracking.gate import Decision, Evidence, Memorization, decide, not_finite

NAN = float("nan")
FID = figure(3.0, uncertainty=0.0)


@pytest.mark.parametrize(
    ("one", "other", "better"),
    [
        (replace(FID, value=2.0), FID, True),
        (FID, replace(FID, value=2.0), False),
        (FID, FID, False),
        (replace(FID, lower_is_better=False), replace(FID, value=2.0, lower_is_better=False), True),
        (replace(FID, value=NAN), FID, False),
        (replace(FID, value=2.49, uncertainty=0.4), replace(FID, uncertainty=0.3), True),
        (replace(FID, value=2.51, uncertainty=0.4), replace(FID, uncertainty=0.3), False),
        (replace(FID, value=1.0, uncertainty=NAN), replace(FID, uncertainty=0.3), False),
    ],
)
def test_better_means_by_more_than_the_combined_uncertainty(one, other, better):
    assert one.better_than(other) is better


def test_uncertainties_add_in_quadrature():
    assert figure(3.0).combined_uncertainty(figure(1.0, uncertainty=0.4)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "changes", [{"fingerprint": "b" * 64}, {"num_images": 1000}, {"name": "eval/classifier_score_n512"}]
)
def test_other_fingerprint_count_or_name_cannot_be_compared(changes):
    assert FID.differs_from(replace(FID, **changes)) and not FID.differs_from(FID)


@pytest.mark.parametrize(
    ("copies", "real_copies", "passed"),
    [
        (0, 0, True),
        (8, 0, True),  # with k copies and none among real images the standard error is about sqrt(k) / 256
        (12, 0, False),
        (256, 0, False),
        (20, 20, True),
        (60, 20, False),
        (0, 256, True),
    ],
)
def test_copies_beyond_those_of_real_images_and_chance_fail(copies, real_copies, passed):
    assert Memorization(copies, 256, real_copies, 256).passed is passed


def test_few_real_images_leave_more_to_chance():
    assert Memorization(copies=12, num_images=256, real_copies=0, num_real_images=20).passed


@pytest.mark.parametrize(
    ("of", "champion", "promoted", "reason"),
    [
        (evidence(9.0), None, True, ["= 9 ± 0.3"]),
        (evidence(9.0), ("1", figure(9.5)), True, ["9 ± 0.3", " 0.42 ", "9.5 ± 0.3", "version 1"]),
        (evidence(9.0), ("1", figure(9.4)), False, ["9 ± 0.3", " 0.42 ", "9.4 ± 0.3", "version 1"]),
        (evidence(9.0, uncertainty=0.4), ("1", figure(9.5)), False, ["9 ± 0.4", " 0.5 ", "9.5 ± 0.3"]),
        (evidence(9.0), ("1", figure(8.0)), False, ["8 ± 0.3", "version 1"]),
        (evidence(9.0), ("1", figure(NAN)), False, ["nan ± 0.3"]),
        (evidence(NAN), None, False, ["nan ± 0.3"]),
        (evidence(9.0, uncertainty=NAN), None, False, ["9 ± nan"]),
        (evidence(float("-inf")), ("1", figure(8.0)), False, ["-inf ± 0.3"]),
        (evidence(1.0, broken=("a", "b")), ("1", figure(8.0)), False, ["a, b"]),
        (evidence(1.0, COPIES), None, False, ["60 of 256", "3 of 256"]),
        (evidence(1.0, fingerprint="e" * 64), ("1", figure(8.0)), False, ["version 1"]),
        (evidence(1.0, num_images=64), ("1", figure(8.0)), False, ["64 images"]),
        (evidence(1.0), ("1", None), False, ["version 1"]),
        (evidence(9.0), ("2", figure(1.0)), True, ["= 9 ± 0.3"]),
        (evidence(1.0, COPIES), ("2", figure(1.0)), False, ["60 of 256"]),
    ],
)
def test_decision_has_its_numbers_and_is_plain_data(of, champion, promoted, reason):
    number, measured = champion or ("", None)
    of_champion = None if measured is None else Evidence(measured, CLEAN)
    decision = decide(of, version="2", champion=number, of_champion=of_champion)
    assert decision.promoted is promoted
    assert [part for part in reason if part not in decision.reason] == []
    plain = json.dumps(asdict(decision))
    assert json.dumps(asdict(Decision.from_json(plain))) == plain


def test_not_finite_names_the_culprits():
    assert not_finite({"a": 1.0, "b": NAN, "c": float("inf")}) == ["b", "c"]
