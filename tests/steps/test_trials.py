"""Conclusions from the trials of a search."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refused import refused

from ncsn.config import Config, changed_settings, from_yaml
from ncsn.distributed.trials import Rung, Scored, SearchPlan, TrialRecord
from ncsn.steps.tune import baseline_objective, best_config, best_trial, pictures, table

DIGITS = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()
OBJECTIVE = "eval/classifier_fid_n256"


@pytest.fixture(scope="module")
def config() -> Config:
    return from_yaml(DIGITS, overrides=["search={}"])


def sampler(epsilon: float) -> dict[str, Any]:
    settings = {"steps_per_level": 10, "epsilon": epsilon, "denoise": True, "consistent": False}
    return {"kind": "annealed_langevin", **settings}


def trial(number: int, *reached: tuple[int, float], failure: str | None = None, **values: float) -> TrialRecord:
    rungs = tuple(
        Rung(
            images_seen=images,
            objective=objective,
            sampler=sampler(8e-5),
            sweep=[
                Scored(sampler(8e-5), objective),
                Scored(sampler(9e-5), objective + 1),
                Scored(sampler(1e-2), None),
            ],
            loss=0.5,
            seconds=1.5,
            checkpoint=f"images-{images:09d}",
        )
        for images, objective in reached
    )
    return TrialRecord(
        uri=f"trial-{number}",
        number=number,
        values={"noise.sigma_1": 1.0, "noise.sigma_L": 0.03} | {f"noise.{key}": value for key, value in values.items()},
        rungs=rungs,
        failure=failure,
        stopped=False,
        last_rung=40,
    )


def test_the_furthest_come_first_and_the_earlier_of_equals() -> None:
    early, far, as_far, further_but_failed = (
        trial(0, (10, 1.0)),
        trial(1, (10, 5.0), (40, 3.0)),
        trial(2, (10, 5.0), (40, 3.0)),
        trial(3, (10, 0.1), (40, 0.1), failure="it diverged"),
    )
    assert best_trial([early, as_far, far, further_but_failed], accidents={}) is far
    assert best_trial([early, further_but_failed], accidents={}) is early


def test_when_all_have_failed_the_reason_is_said() -> None:
    failed = [trial(0, failure="training diverged: loss nan"), trial(1)]
    with refused("search.space") as caught:
        best_trial(failed, accidents={})
    assert "loss nan" in str(caught.value)
    with refused("search.space") as caught:
        best_trial([trial(1)], accidents={"trial-1": "Traceback ...\nNodeDied: gone\n"})
    assert "NodeDied: gone" in str(caught.value)


def test_the_best_config_is_complete_and_searches_no_more(config: Config) -> None:
    best = best_config(config, trial(4, (40, 2.0), sigma_1=2.0, sigma_L=0.02))
    assert best.search is None
    assert asdict(best.sampling.sampler) == sampler(8e-5)
    assert set(changed_settings(config, best)) == {"noise.sigma_1", "noise.sigma_L"}


def test_the_baseline_is_scored_by_its_own_sampler(config: Config) -> None:
    plan = SearchPlan(config=config, dataset="", trials="")
    trials = [trial(0, (10, 5.0), (40, 3.0)), trial(1, (40, 2.0), sigma_1=2.0)]
    assert baseline_objective(plan, trials, images_seen=40) == 4.0
    assert baseline_objective(plan, trials, images_seen=160) is None
    assert baseline_objective(plan, trials[1:], images_seen=40) is None


def test_the_table_has_a_row_per_trial() -> None:
    rows = table([trial(0, (10, 5.0), (40, 3.0)), trial(1, failure="too far"), trial(2)], accidents={"trial-2": "lost"})
    assert [(row["trial"], row["status"], row["objective"], row["seconds"], row["reason"]) for row in rows] == [
        (0, "finished", 3.0, 3.0, ""),
        (1, "failed", None, 0, "too far"),
        (2, "unfinished", None, 0, "lost"),
    ]


def test_plots_are_drawn_also_with_trials_that_failed() -> None:
    trials = [trial(0, (10, 5.0), (40, 3.0)), trial(1, (10, 9.0), sigma_1=3.0), trial(2, failure="no", sigma_1=9.0)]
    drawn = pictures(trials, trials[0], OBJECTIVE)
    assert set(drawn) == {"coordinates.png", "epsilon.png"}
    for png in drawn.values():
        assert np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).std() > 0
