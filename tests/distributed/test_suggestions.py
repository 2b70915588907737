"""What to try next: within the space, never twice, the same for the same seed, and learning."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ncsn.config.choices import ChoiceDomain, Domain, LogDomain, UniformDomain
from ncsn.distributed.search import Suggestions

SPACE: dict[str, Domain] = {
    "noise.sigma_1": LogDomain(kind="log", low=0.1, high=10),
    "noise.num_levels": UniformDomain(kind="uniform", low=4, high=40),
    "network.widths": ChoiceDomain(kind="choice", values=([8], [8, 16])),
}


def suggestions(space: dict[str, Domain] = SPACE, **settings: Any) -> Suggestions:
    return Suggestions(space, **{"whole": ["noise.num_levels"], "algorithm": "random", "seed": 1, **settings})


def draw(source: Suggestions, count: int) -> list[dict[str, Any]]:
    return [values for _ in range(count) if (values := source.next()) is not None]


def test_values_are_those_that_a_config_takes() -> None:
    drawn = draw(suggestions(), 200)
    assert all(0.1 <= values["noise.sigma_1"] <= 10 for values in drawn)
    assert all(type(values["noise.num_levels"]) is int and 4 <= values["noise.num_levels"] <= 40 for values in drawn)
    assert all(values["network.widths"] in ([8], [8, 16]) for values in drawn)
    # By their logarithm, half of the values lie below the geometric middle.
    assert np.mean([values["noise.sigma_1"] < 1 for values in drawn]) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_the_seed_decides(algorithm: str) -> None:
    one, same, other = (draw(suggestions(algorithm=algorithm, seed=seed), 5) for seed in (1, 1, 2))
    assert one == same != other


def test_a_search_that_goes_on_draws_what_it_would_have_drawn() -> None:
    whole = draw(suggestions(), 8)
    rest = suggestions()
    for values in whole[:5]:
        rest.learn(values, 1.0)
    assert draw(rest, 3) == whole[5:]


def test_nothing_is_given_twice_and_the_end_is_said() -> None:
    few: dict[str, Domain] = {"loss.anneal_power": ChoiceDomain(kind="choice", values=(1.0, 2.0, 3.0))}
    source = suggestions(few, first=[{"loss.anneal_power": 2.0}, {"loss.anneal_power": 2.0}])
    assert sorted(values["loss.anneal_power"] for values in draw(source, 10)) == [1.0, 2.0, 3.0]
    assert source.next() is None


def test_what_lies_outside_the_space_is_given_first_and_teaches_nothing() -> None:
    own = {"noise.sigma_1": 50.0, "noise.num_levels": 10, "network.widths": [64]}
    source = suggestions(first=[own])
    assert source.next() == own
    source.learn(own, 1.0)
    assert source.next() != own


def test_optuna_learns_where_it_is_good() -> None:
    """The distance to sigma = 3 on the logarithm: later draws lie nearer than chance."""

    def mean_distance(algorithm: str) -> float:
        source = suggestions({"noise.sigma_1": SPACE["noise.sigma_1"]}, whole=[], algorithm=algorithm)
        distances = []
        for _ in range(60):
            values = source.next()
            assert values is not None
            distances.append(abs(math.log(values["noise.sigma_1"] / 3)))
            source.learn(values, distances[-1])
        return float(np.mean(distances[30:]))

    assert mean_distance("optuna") < 0.6 * mean_distance("random")
