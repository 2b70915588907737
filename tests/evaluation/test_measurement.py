from dataclasses import replace

import pytest

from ncsn.evaluation.measurement import FingerprintMismatchError, Measurement

FID = Measurement(
    name="eval/classifier_fid_n512", value=3.0, num_images=512, fingerprint="a" * 64, lower_is_better=True
)


def test_direction_decides_what_is_better() -> None:
    lower = replace(FID, value=2.0)
    assert lower.better_than(FID)
    assert not FID.better_than(lower)
    assert not FID.better_than(FID)
    assert replace(FID, lower_is_better=False).better_than(replace(lower, lower_is_better=False))
    assert not replace(FID, value=float("nan")).better_than(FID)


def test_other_fingerprint_count_or_name_refuse_to_be_compared() -> None:
    with pytest.raises(FingerprintMismatchError, match="fingerprint aaaaaaaaaaaa and bbbbbbbbbbbb differ"):
        FID.better_than(replace(FID, fingerprint="b" * 64))
    with pytest.raises(FingerprintMismatchError, match="over 512 images cannot be compared"):
        FID.better_than(replace(FID, num_images=1000, name="eval/classifier_fid_n1000"))
    with pytest.raises(ValueError, match="classifier_score"):
        FID.better_than(replace(FID, name="eval/classifier_score_n512"))
