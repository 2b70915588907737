"""The parts of a search that need no cluster: points, room for trials, rungs, records, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from refused import refused
from workers import train

from ncsn.config import from_yaml
from ncsn.config.choices import AutoguidanceConfig, ChoiceDomain, Domain, RangeDomain
from ncsn.config.compute import ComputeConfig
from ncsn.distributed import sampling, trials
from ncsn.distributed.sampling import Chunk
from ncsn.distributed.search import DRIVER_MEMORY, Halving, Suggestions, trials_at_once
from ncsn.distributed.trials import FAILED, Rung, Scored, SearchPlan, TrialFolder, read_trials, run_trial
from ncsn.errors import NotFound, UserError
from ncsn.model.checkpoint import CheckpointError, DamagedError

SEARCH = "search={num_trials: 4, reduction_factor: 2, num_samples: 8}"
GIB = float(2**30)


def rung(images: int, objective: float) -> Rung:
    sampler = {"kind": "annealed_langevin", "epsilon": 1e-5}
    return Rung(images, objective, sampler, [Scored(sampler, objective)], 0.5, 1.0, f"images-{images:09d}")


@pytest.fixture
def plan(tiny: str, tmp_path: Path) -> SearchPlan:
    return SearchPlan(from_yaml(tiny, overrides=[SEARCH]), dataset="nowhere", trials=str(tmp_path))


@pytest.mark.parametrize(
    ("resources", "compute", "expected"),
    [
        ({"CPU": 3, "memory": 8 * GIB}, {"num_workers": [1, 3]}, 3),
        ({"CPU": 7, "memory": 8 * GIB}, {"num_workers": 1, "cpus_per_worker": 2}, 3),
        ({"CPU": 64, "GPU": 4, "memory": 64 * GIB}, {"num_workers": 2, "use_gpu": True}, 2),
        ({"CPU": 64, "memory": 2.5 * DRIVER_MEMORY}, {"num_workers": 1}, 2),
    ],
)
def test_as_many_trials_as_the_cluster_holds(resources, compute, expected) -> None:
    """All workers of all trials have room at once, so no trial waits for what another holds."""
    assert trials_at_once(resources, ComputeConfig(**compute)) == expected


def follow(scheduler: Halving, name: str, values: dict[str, Any], objectives: list[float], rungs: list[int]) -> int:
    """Images at which the scheduler stops a trial that would reach these objectives."""
    trial: Any = SimpleNamespace(trial_id=name, config={"values": values})
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    return next(
        images
        for images, objective in zip(rungs, objectives, strict=False)
        if scheduler.on_trial_result(None, trial, {"images_seen": images, "objective": objective}) == "STOP"
    )


def test_halving_keeps_the_better_half_and_the_baseline_and_remembers_earlier_trials(plan: SearchPlan) -> None:
    scheduler = Halving(plan, earlier=[])
    assert plan.rungs == [40, 80, 160]
    other = {"noise.sigma_1": 2.0, "noise.sigma_L": 0.01}
    assert follow(scheduler, "first", other, [5, 5, 5], plan.rungs) == 160
    assert follow(scheduler, "worse", other, [9, 9, 9], plan.rungs) == 40
    assert follow(scheduler, "better, then worse", other, [4, 6, 6], plan.rungs) == 80
    assert follow(scheduler, "baseline", plan.baseline, [99, 99, 99], plan.rungs) == 160
    assert follow(scheduler, "failed", other, [FAILED], plan.rungs) == 40
    for number, objective in enumerate([1.0, 2.0]):
        folder = TrialFolder.of(plan.trials, values := {"noise.sigma_1": 1.0 + number, "noise.sigma_L": 0.01})
        folder.start(number, values)
        folder.reach(rung(40, objective))
        folder.stop()
    earlier = read_trials(plan.trials, last_rung=160)
    assert [trial.status for trial in earlier] == ["stopped", "stopped"]
    assert follow(Halving(plan, earlier=earlier), "new", other, [3.0, 3.0, 3.0], plan.rungs) == 40


def test_a_trial_that_cannot_go_on_fails_alone_and_nothing_is_tried_again(plan, monkeypatch) -> None:
    """What is missing or damaged is not the fault of its settings."""

    def reported() -> list[tuple[int, float]]:
        found: list[tuple[int, float]] = []
        run_trial(plan, plan.baseline, report=lambda point: found.append((point["images_seen"], point["objective"])))
        return found

    folder = TrialFolder.of(plan.trials, plan.baseline)
    folder.start(0, plan.baseline)
    folder.reach(rung(40, 7.0))
    monkeypatch.setattr(trials, "_reach", reach := Mock())
    for error in (NotFound("nowhere", "no dataset here"), DamagedError("nowhere", "a file is missing")):
        reach.side_effect = error
        with refused("nowhere", error=type(error)):
            reported()
    assert folder.failure is None
    reach.side_effect = UserError("optimizer.learning_rate", "it diverged")
    assert reported() == reported() == [(40, 7.0), (80, FAILED)]
    assert reach.call_count == 3
    (record,) = read_trials(plan.trials, last_rung=160)
    assert record.status == "failed" and "it diverged" in (record.failure or "")


def test_a_missing_checkpoint_or_guide_is_not_a_sampler_that_diverges(plan, dataset, tmp_path) -> None:
    missing = Chunk(plan.config, plan.config.sampling, f"{plan.trials}/nowhere", 0, 4)
    with refused(missing.checkpoint, error=CheckpointError):
        sampling._score(missing)
    guidance = AutoguidanceConfig(kind="autoguidance", weight=2.0, checkpoint=missing.checkpoint)
    guided = plan.config.sampling.model_copy(update={"guidance": guidance})
    with refused("sampling.guidance.checkpoint"):
        sampling._score(Chunk(plan.config, guided, str(train(plan.config, dataset, tmp_path / "here")), 0, 4))


def test_samples_of_a_search_are_not_those_of_the_final_figures(plan: SearchPlan) -> None:
    samplings = plan.samplings(plan.baseline)
    assert {each.seed for each in samplings} == {1} != {plan.config.sampling.seed}
    assert plan.config.sampling.sampler in [each.sampler for each in samplings]


def test_records_keep_their_first_content(plan: SearchPlan) -> None:
    values = {"noise.sigma_1": 2.0, "noise.sigma_L": 0.01}
    folder = TrialFolder.of(plan.trials, values)
    folder.start(3, values)
    folder.start(9, values)
    folder.reach(rung(40, 7.0))
    folder.reach(rung(40, 8.0))
    (record,) = read_trials(plan.trials, last_rung=160)
    assert (record.number, record.values, record.status) == (3, values, "unfinished")
    assert record.rungs == (rung(40, 7.0),)
    assert TrialFolder.of(plan.trials, dict(reversed(values.items()))) == folder


SPACE: dict[str, Domain] = {
    "noise.sigma_1": RangeDomain(kind="log", low=0.1, high=10),
    "train.ema.images": RangeDomain(kind="uniform", low=4, high=40),
    "network.widths": ChoiceDomain(kind="choice", values=([8], [8, 16])),
}


def suggestions(space: dict[str, Domain] = SPACE, **settings: Any) -> Suggestions:
    return Suggestions(space, **{"whole": ["train.ema.images"], "seed": 1, **settings})


def draw(source: Suggestions, count: int) -> list[dict[str, Any]]:
    points = [source.suggest(str(number)) for number in range(count)]
    return [point["values"] for point in points if point != Suggestions.FINISHED]


def test_values_are_those_that_a_config_takes() -> None:
    drawn = draw(suggestions(), 200)
    assert all(0.1 <= values["noise.sigma_1"] <= 10 for values in drawn)
    assert all(type(values["train.ema.images"]) is int and 4 <= values["train.ema.images"] <= 40 for values in drawn)
    assert all(values["network.widths"] in ([8], [8, 16]) for values in drawn)
    # By their logarithm, half of the values lie below the geometric middle.
    assert np.mean([values["noise.sigma_1"] < 1 for values in drawn]) == pytest.approx(0.5, abs=0.12)


def test_a_search_that_goes_on_draws_what_it_would_have_drawn() -> None:
    whole = draw(suggestions(), 8)
    assert draw(suggestions(seed=2), 8) != whole
    rest = suggestions()
    for values in whole[:5]:
        rest.learn(values, 1.0)
    assert draw(rest, 3) == whole[5:]


def test_nothing_is_given_twice_and_the_end_is_said() -> None:
    few: dict[str, Domain] = {"loss.anneal_power": ChoiceDomain(kind="choice", values=(1.0, 2.0, 3.0))}
    source = suggestions(few, first=[{"loss.anneal_power": 2.0}, {"loss.anneal_power": 2.0}])
    assert sorted(values["loss.anneal_power"] for values in draw(source, 10)) == [1.0, 2.0, 3.0]
    assert source.suggest("last") == Suggestions.FINISHED


def test_what_lies_outside_the_space_is_given_first_and_teaches_nothing() -> None:
    own = {"noise.sigma_1": 50.0, "train.ema.images": 10, "network.widths": [64]}
    source = suggestions(first=[own])
    assert draw(source, 1) == [own]
    source.learn(own, 1.0)
    assert draw(source, 1) != [own]


def test_it_learns_where_it_is_good() -> None:
    """Near sigma = 3, from which even draws are 1.4 away on the logarithm in the mean."""
    source, distances = suggestions({"noise.sigma_1": SPACE["noise.sigma_1"]}, whole=[]), []
    for _ in range(60):
        (values,) = draw(source, 1)
        distances.append(abs(math.log(values["noise.sigma_1"] / 3)))
        source.learn(values, distances[-1])
    assert np.mean(distances[30:]) < 0.6 * 1.4
