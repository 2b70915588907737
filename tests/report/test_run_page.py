"""The page of a run is Markdown that KFP's viewer shows as meant."""

from __future__ import annotations

from ncsn.report.cards import RunFacts, run_page

FACTS = RunFacts(
    run="mine",
    status="FAILED",
    reason="train: a <b>bad</b> thing\nsecond line",
    steps={"ingest": "done", "train": "failed | late"},
    places={"MLflow run": "http://mlflow/#/runs/1", "dataset digest": "abc", "image": ""},
    notes=["The gate: better"],
)


def test_addresses_are_links_and_the_rest_is_literal() -> None:
    page = run_page(FACTS)
    assert "| MLflow run | <http://mlflow/#/runs/1> |" in page
    assert "| dataset digest | `abc` |" in page
    assert "image" not in page, "an empty place is left out"


def test_nothing_breaks_out_of_its_cell() -> None:
    page = run_page(FACTS)
    assert page.startswith("# mine: FAILED\n\n> train: a &lt;b>bad&lt;/b> thing\n> second line\n")
    assert "| train | failed \\| late |" in page
    assert page.endswith("- The gate: better\n")
