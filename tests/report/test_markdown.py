"""The model card has the facts that it is given and fits a registry description; the run page is plain Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from experiments import SHORT, tiny

from ncsn.config.schema import Pixels
from ncsn.data.format import Manifest
from ncsn.report.pages import render
from ncsn.runs.record import Outcome
from ncsn.tracking.registry import DESCRIPTION_LENGTH

EMPTY = ("class_counts", "parts", "settings", "suggested_noise", "conversions", "repeated")
MANIFEST = Manifest(
    name="digits",
    digest="0123abcd",
    pixels=Pixels((8, 8, 1)),
    counts={"train": 1258, "test": 539},
    class_names=list("0123456789"),
    skipped=[],
    left_out=0,
    source="Handwritten digits.",
    license="CC BY 4.0",
    owner="Somebody",
    url="",
    **{name: {} for name in EMPTY},
)
EVALUATION = {
    "metrics": {
        "eval/classifier_score_n512": 8.7654321,
        "eval/classifier_score_std_n512": 0.5,
        "eval/classifier_fid_n512": 14.0,
    },
    "real_metrics": {"eval/real_classifier_score_n539": 9.25},
    "verdict": "512 images made.",
    "notes": ["the smaller set has the smaller score"],
}
FACTS = {
    "name": "ncsn-tiny",
    "registry": "http://mlflow:5000",
    "run": "a-run",
    "checkpoint": "cafe",
    "images_seen": 8,
    "num_parameters": 1234567,
    "nfe": 5,
    "average": "train.ema.per_step = 0.9",
    "cost": "",
    "pictures": {},
    "warnings": [],
    "selection": None,
    "utility": None,
}


def card(*overrides: str, manifest: Manifest = MANIFEST, classes: object = None, **facts: object) -> str:
    config, evaluation = tiny("store", *SHORT, *overrides), EVALUATION | {"classes": classes}
    return render("model_card.md.j2", **FACTS | facts, config=config, manifest=manifest, evaluation=evaluation)


def by_class(names: Sequence[str]) -> dict[str, object]:
    """Scores by class, the last of which agree least."""
    shares = [1 - 0.5 * number / len(names) for number in range(len(names))]
    lines = [{"num_images": 51, "kid": 0.0123, "name": each, "agreement": shares[n]} for n, each in enumerate(names)]
    return {"table": lines, "real_table": [line | {"agreement": 0.875} for line in lines]}


@pytest.mark.parametrize(
    ("overrides", "facts", "said"),
    [
        (
            (),
            {"cost": "3.1 min", "warnings": ["The model overfits."], "pictures": {"samples": "a.png", "near": "b.png"}},
            ("![samples](a.png) ![near](b.png)", "| cost | 3.1 min |", "## Limits\n\n- The model overfits.\n- "),
        ),
        (
            ("sampling.label=3", "train.init_from=models:/old/1", "train.trainable=light"),
            {"average": "train.ema.images = 500"},
            ("EMA of train.ema.images = 500", "| start |", "models:/old/1", "light", "| classes of the samples | 3 |"),
        ),
        (("train.continue_from=first",), {}, ("| start | the state of run first ",)),
        (
            (
                "loss={kind: consistency, q: 2, stages: 8, pairs: teacher, guidance: {kind: classifier_free}}",
                "noise.training={kind: lognormal}",
                "sampling.sampler={kind: consistency}",
                "train.init_from=digits-edm",
            ),
            {"nfe": 2},
            ("consistency model", "| loss | consistency, q = 2, stages = 8, pairs = teacher |", "learned in training"),
        ),
    ],
)
def test_a_card_has_what_is_special_about_its_model(overrides, facts, said) -> None:
    text, plain = card("data.num_classes=10", *overrides, **facts), card("data.num_classes=10")
    assert [part for part in said if part not in text or part in plain] == []


def test_a_card_says_where_its_model_comes_from_how_good_it_is_and_how_to_use_it() -> None:
    text = card()
    said = ("`a-run`", "`cafe`", "1,234,567", "1,258 train, 539 test", "0123abcd", "CC BY 4.0", "NFE 5", "2 levels")
    said += (EVALUATION["verdict"], EVALUATION["notes"][0], 'load_model("models:/ncsn-tiny@champion")')
    said += ("| `eval/classifier_score_n512` | 8.765 | 9.25 of 539 |", "| `eval/classifier_fid_n512` | 14 |  |")
    assert [part for part in said if part not in text] == []
    absent = ("![", "## Choice", "## Classes", '"label"', "_std_")
    assert [part for part in absent if part in text] == []


def test_the_run_page_links_addresses_and_escapes_the_rest() -> None:
    page = render(
        "run_page.md.j2",
        run="mine",
        outcome=Outcome("FAILED", "a <b>bad</b> thing\nsecond line", "train"),
        steps={"ingest": "done", "train": "failed | late"},
        places={"MLflow run": "http://mlflow/#/runs/1", "dataset digest": "abc", "image": ""},
        notes=["The gate: better"],
    )
    assert "| MLflow run | <http://mlflow/#/runs/1> |" in page and "| dataset digest | `abc` |" in page
    assert "image" not in page, "an empty place is left out"
    assert page.startswith("# mine: FAILED\n\n> train: a &lt;b>bad&lt;/b> thing\n> second line\n")
    assert "| train | failed \\| late |" in page
    assert page.endswith("- The gate: better\n")


def test_a_chosen_checkpoint_is_shown_among_the_best_candidates() -> None:
    rows = [
        {
            "images_seen": 1000 * i,
            "value": abs(i - 4) + 0.5,
            "low": 0.4,
            "high": 9.0,
            "digest": f"{i:016d}",
        }
        for i in range(9)
    ]
    rows.append({"images_seen": 1, "value": None, "digest": "x"})
    selection = {
        "candidates": rows,
        "figure": "eval/classifier_fid_n1000",
        "sentence": "lower",
        "notes": ["one", "two"],
    }
    text = card(selection=selection)
    assert len(text) <= DESCRIPTION_LENGTH
    table = text.partition("## Choice")[2].partition("## Limits")[0]
    assert [f"| {1000 * i:,} |" in table for i in range(9)] == [i in (2, 3, 4, 5, 6) for i in range(9)]
    assert "| 0.50 (0.40 to 9.0) |" in table and "10 candidates: lower. one. two\n" in table


def test_classes_are_named_with_their_scores() -> None:
    known = ("data.num_classes=10", "train.label_dropout=0.1", "sampling.guidance={kind: classifier_free, weight: 2}")
    text = card(*known, classes=by_class(MANIFEST.class_names))
    assert '"label": "0"' in text and '"0", "1"' in text
    assert "| 3 | 51 | 85.0% | 87.5% | 0.0123 |" in text
    assert "| guidance | classifier_free, weight 2," in text
    names = [f"a long name of class {number}" for number in range(1000)]
    many = card("data.num_classes=1000", manifest=replace(MANIFEST, class_names=names), classes=by_class(names))
    assert len(many) < DESCRIPTION_LENGTH and "980 more" in many
    assert '"a long name of class 999"' not in many and "| a long name of class 999 | 51 |" in many


def test_a_card_has_the_terms_of_the_config_else_those_of_the_dataset() -> None:
    assert card().endswith("which has these terms: CC BY 4.0; owner: Somebody\n")
    given = card("data.license=Mine | <i>\nonly", "data.owner=Me", "data.url=https://example.org/images")
    assert given.endswith("terms: Mine \\| &lt;i> only; owner: Me; from https://example.org/images\n")
