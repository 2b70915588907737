"""What compares with what, from which difference on, and how many copies are too many."""

from dataclasses import replace

import pytest
from refused import refused

from ncsn.tracking.gate import FingerprintMismatchError, Measurement, Memorisation

FID = Measurement(
    name="eval/classifier_fid_n512",
    value=3.0,
    uncertainty=0.0,
    num_images=512,
    fingerprint="a" * 64,
    lower_is_better=True,
)


def test_direction_decides_what_is_better() -> None:
    lower = replace(FID, value=2.0)
    assert lower.better_than(FID)
    assert not FID.better_than(lower)
    assert not FID.better_than(FID)
    assert replace(FID, lower_is_better=False).better_than(replace(lower, lower_is_better=False))
    assert not replace(FID, value=float("nan")).better_than(FID)


def test_better_means_by_more_than_both_uncertainties_together() -> None:
    champion = replace(FID, uncertainty=0.3)
    assert replace(FID, value=2.49, uncertainty=0.4).better_than(champion)
    assert not replace(FID, value=2.51, uncertainty=0.4).better_than(champion)
    assert not replace(FID, value=1.0, uncertainty=float("nan")).better_than(champion)
    assert champion.combined_uncertainty(replace(FID, uncertainty=0.4)) == pytest.approx(0.5)
    assert str(champion) == "3 \u00b1 0.3"


def test_other_fingerprint_count_or_name_refuse_to_be_compared() -> None:
    with refused(FID.name, error=FingerprintMismatchError) as caught:
        FID.better_than(replace(FID, fingerprint="b" * 64))
    assert "aaaaaaaaaaaa and bbbbbbbbbbbb" in caught.value.problems[0].reason
    with refused(FID.name, error=FingerprintMismatchError):
        FID.better_than(replace(FID, num_images=1000, name="eval/classifier_fid_n1000"))
    with refused(FID.name, error=FingerprintMismatchError):
        FID.better_than(replace(FID, name="eval/classifier_score_n512"))


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
def test_copies_beyond_those_of_real_images_and_chance_fail(copies: int, real_copies: int, passed: bool) -> None:
    assert Memorisation(copies, 256, real_copies, 256).passed is passed


def test_few_real_images_leave_more_to_chance() -> None:
    assert Memorisation(copies=12, num_images=256, real_copies=0, num_real_images=20).passed
