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
from ray.exceptions import RayError


@pytest.fixture(scope="module")
def driver() -> Iterator[RayDriver]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(gpu_calls.__file__).parent), prepend=os.pathsep)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            driver = RayDriver(pool)
            driver(gpu_calls.start, 2)
            yield driver


def cards_of(places: list[gpu_calls.Place]) -> dict[int, set[tuple[int, ...]]]:
    found = defaultdict(set)
    for process, cards in places:
        found[process].add(cards)
    return found


def test_a_process_has_one_gpu_for_call_after_call(driver: RayDriver, tmp_path: Path) -> None:
    cards = cards_of(driver(gpu_calls.results, gpu_calls.meet, [tmp_path] * 10))
    assert sorted(cards.values(), key=sorted) == [{(0,)}, {(1,)}]  # sets alone have no total order
    assert driver(gpu_calls.gpus_left, 120.0) == 2
    # Another round has other processes, so that no context stays on a card that is lent to another job by then.
    again = cards_of(driver(gpu_calls.results, gpu_calls.place, [0.05] * 4, at_once=1))
    assert len(again) == 1 and not cards.keys() & again.keys()
    places = driver(gpu_calls.results, gpu_calls.place, [0.01] * 20, gpu=False)
    assert len(places) == 20 and {cards for _, cards in places} == {()} and len(cards_of(places)) <= 4


@pytest.mark.parametrize("gpu", [False, True])
def test_values_come_while_calls_go_on(driver: RayDriver, tmp_path: Path, gpu: bool) -> None:
    found = driver(gpu_calls.told, tmp_path, gpu=gpu)
    assert len(found) == 4 and {(0, "a"), (1, "b")} < {*found}
    assert len({value for _, value in found} - {"a", "b"}) == 2, "two processes"


def test_what_a_lost_process_had_is_done_by_another(driver: RayDriver, tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(3)]
    files[2].touch()  # is not lost
    assert sorted(driver(gpu_calls.results, gpu_calls.die_once, files)) == ["0", "1", "2"]
    assert driver(gpu_calls.gpus_left, 120.0) == 2


@pytest.mark.slow
def test_a_call_that_kills_every_process_is_an_error(driver: RayDriver, tmp_path: Path) -> None:
    with pytest.raises(RayError, match="actor"):
        driver(gpu_calls.results, gpu_calls.die_once, [tmp_path / "fatal"])


def test_a_mistake_is_raised_as_one_and_frees_the_gpus(driver: RayDriver) -> None:
    with pytest.raises(ValueError, match="not 2"):
        driver(gpu_calls.results, gpu_calls.refuse, [0, 1, 2, 3, 4, 5])
    assert driver(gpu_calls.gpus_left, 120.0) == 2
