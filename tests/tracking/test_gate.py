"""The gate's decision: what compares with what, how much is better, how many copies are too many."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from gated import CLEAN, COPIES, evidence, figure

from ncsn.tracking.gate import Decision, Evidence, Memorization, decide

NAN = float("nan")


def higher(value: float) -> Evidence:
    """A metric of which higher is better."""
    return Evidence(replace(figure(value), lower_is_better=False), CLEAN)


@pytest.mark.parametrize(
    ("copies", "real_copies", "num_real_images", "passed"),
    [
        (0, 0, 256, True),
        (8, 0, 256, True),  # with k copies and none among real images the standard error is about sqrt(k) / 256
        (12, 0, 256, False),
        (12, 0, 20, True),
        (256, 0, 256, False),
        (20, 20, 256, True),
        (60, 20, 256, False),
        (0, 256, 256, True),
    ],
)
def test_copies_beyond_those_of_real_images_and_chance_fail(copies, real_copies, num_real_images, passed):
    assert (not Memorization(copies, 256, real_copies, num_real_images).objection) is passed


@pytest.mark.parametrize(
    ("of", "champion", "promoted", "reason"),
    [
        (evidence(9.0), None, True, ["= 9 ± 0.3"]),
        (evidence(9.0), ("1", figure(9.5)), True, ["9 ± 0.3", " 0.42 ", "9.5 ± 0.3", "version 1"]),
        (evidence(9.0), ("1", figure(9.4)), False, ["9 ± 0.3", " 0.42 ", "9.4 ± 0.3", "version 1"]),
        (evidence(9.0, uncertainty=0.4), ("1", figure(9.5)), False, ["9 ± 0.4", " 0.5 ", "9.5 ± 0.3"]),
        (evidence(9.0), ("1", figure(8.0)), False, ["8 ± 0.3", "version 1"]),
        (higher(9.0), ("1", figure(8.0)), True, ["8 ± 0.3", "version 1"]),
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
