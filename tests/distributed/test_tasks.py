"""Calls on a real Ray cluster that says it has two GPUs: which process makes them on which card, and if one is lost."""

from __future__ import annotations

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gpu_calls
import pytest
from on_ray import RayDriver

HELPERS = Path(gpu_calls.__file__).parent


@pytest.fixture(scope="module")
def driver() -> Iterator[RayDriver]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HELPERS), prepend=os.pathsep)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            driver = RayDriver(pool)
            driver(gpu_calls.start, 2)
            yield driver


def cards_of(places: list[gpu_calls.Place]) -> dict[int, set[tuple[int, ...]]]:
    found = defaultdict(set)
    for process, cards in places:
        found[process].add(cards)
    return found


def test_a_process_has_one_gpu_and_makes_call_after_call(driver: RayDriver, tmp_path: Path) -> None:
    places = driver(gpu_calls.results, gpu_calls.meet, [tmp_path] * 10)
    cards = cards_of(places)
    assert len(places) == 10
    assert len(cards) == 2
    assert sorted(cards.values(), key=sorted) == [{(0,)}, {(1,)}]  # sets alone have no total order
    assert os.getpid() not in cards
    assert driver(gpu_calls.gpus_left, 120.0) == 2
    # Another round has other processes, so that no context stays on a card that is lent to another job by then.
    assert not cards.keys() & cards_of(driver(gpu_calls.results, gpu_calls.place, [0.05] * 4)).keys()


def test_a_limit_holds(driver: RayDriver) -> None:
    assert len(cards_of(driver(gpu_calls.results, gpu_calls.place, [0.05] * 4, at_once=1))) == 1


def test_calls_on_cpus_share_processes_and_have_no_gpu(driver: RayDriver) -> None:
    places = driver(gpu_calls.results, gpu_calls.place, [0.01] * 20, gpu=False)
    assert len(places) == 20
    assert {cards for _, cards in places} == {()}
    assert len({process for process, _ in places}) <= 4


def test_what_a_lost_process_had_is_done_by_another(driver: RayDriver, tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(3)]
    files[2].touch()  # is not lost
    assert sorted(driver(gpu_calls.results, gpu_calls.die_once, files)) == ["0", "1", "2"]
    assert driver(gpu_calls.gpus_left, 120.0) == 2


@pytest.mark.slow
def test_a_call_that_kills_every_process_is_an_error(driver: RayDriver, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="actor") as caught:
        driver(gpu_calls.results, gpu_calls.die_once, [tmp_path / "fatal"])
    assert not isinstance(caught.value, ValueError)


def test_a_mistake_is_raised_as_one_and_frees_the_gpus(driver: RayDriver) -> None:
    with pytest.raises(ValueError, match="not 2"):
        driver(gpu_calls.results, gpu_calls.refuse, [0, 1, 2, 3, 4, 5])
    assert driver(gpu_calls.gpus_left, 120.0) == 2
