"""The card holds the facts that it is given, and fits a registry description."""

from __future__ import annotations

import pytest

from ncsn.data.format import Manifest
from ncsn.report.model_card import Scores, model_card
from ncsn.tracking.registry import DESCRIPTION_LENGTH


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        name="digits",
        digest="0123abcd",
        image_size=8,
        channels=1,
        counts={"train": 1258, "test": 539},
        class_names=list("0123456789"),
        class_counts={},
        mean=[0.3],
        std=[0.4],
        minimum=0,
        maximum=255,
        skipped=[],
        parts={},
        content={},
        schema={},
        source="Handwritten digits.",
        license="CC BY 4.0",
        settings={},
    )


SCORES = Scores(
    metrics={
        "eval/classifier_score_n512": 8.7654321,
        "eval/classifier_score_std_n512": 0.5,
        "eval/classifier_fid_n512": 14.0,
        "eval/classifier_fid_std_n512": 1.0,
        "eval/classifier_kid_n512": 0.1,
        "eval/classifier_kid_std_n512": 0.2,
        "eval/classifier_test_accuracy": 0.97,
    },
    real_metrics={"eval/real_classifier_score_n539": 9.25},
    fingerprint="f" * 64,
    notes=["the smaller set has the smaller score"],
    num_splits=25,
)


def test_figures_stand_beside_those_of_real_images_with_their_counts(checkpoint, manifest):
    card = model_card("ncsn-tiny", checkpoint=checkpoint, manifest=manifest, scores=SCORES, run="a-run")
    assert "| `eval/classifier_score_n512` | 8.765 | 8.569 to 8.961 | 9.25 (n539) |" in card, "1.96 * 0.5 / sqrt(25)"
    assert "| `eval/classifier_fid_n512` | 14 | 12.04 to 15.96 |  |" in card
    assert "| `eval/classifier_kid_n512` | 0.1 |  |  |" in card
    assert "| `eval/classifier_test_accuracy` | 0.97 |  |  |" in card
    assert "_std_" not in card
    assert "f" * 64 in card
    assert "the smaller set" in card


def test_says_where_it_comes_from_and_how_to_use_it(checkpoint, manifest):
    card = model_card(
        "ncsn-tiny",
        checkpoint=checkpoint,
        manifest=manifest,
        scores=SCORES,
        run="a-run",
        cost="3.1 min · 0.1 CPU hours",
        pictures={"samples": "grid.png", "neighbours": "neighbours.png"},
    )
    for fact in ("`a-run`", checkpoint.digest, "1,258 train, 539 test", "0123abcd", "CC BY 4.0", "NFE 5", "2 levels"):
        assert fact in card
    assert "![samples](grid.png) ![neighbours](neighbours.png)" in card
    assert "| cost | 3.1 min · 0.1 CPU hours |" in card
    assert "## Intended use" in card
    assert 'load_model("models:/ncsn-tiny@champion")' in card
    assert len(card) < DESCRIPTION_LENGTH


def test_no_picture_no_link(checkpoint, manifest):
    card = model_card("ncsn-tiny", checkpoint=checkpoint, manifest=manifest, scores=SCORES, run="a-run")
    assert "![" not in card
