"""A search on a real Ray cluster, killed, given again and asked a third time; and conclusions from its trials."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from do import do
from experiments import digits, tiny
from kfp import dsl
from on_ray import RayDriver, ray_driver
from PIL import Image
from refused import refused

from components.tasks import search as component
from ncsn import storage
from ncsn.config import Config, from_yaml, to_json, to_yaml
from ncsn.distributed.trials import Rung, Scored, SearchPlan, TrialRecord
from ncsn.runs.results import SearchResult
from ncsn.steps import search
from ncsn.tracking.client import connect


class Searched(NamedTuple):
    """A search that was killed after its first rungs, and what the same search found afterwards."""

    config: Config
    dataset: str
    before: dict[str, bytes]
    result: SearchResult
    driver: RayDriver


def rung_files(root: Path) -> dict[str, bytes]:
    # Not by `rglob`, which fails if the running search moves a folder meanwhile.
    names = [Path(folder, name) for folder, _, files in os.walk(root) for name in files]
    return {str(path): path.read_bytes() for path in names if path.match("rung-*.json") and ".tmp" not in path.name}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searched]:
    folder = tmp_path_factory.mktemp("search")
    settings = ("data.max_images=256", "train.ema={kind: decay, per_step: 0.9}", "sampling.sampler.steps_per_level=2")
    lengths = ("train.num_images=128", "train.checkpoint_every_images=1000", "train.report_every_images=64")
    space = "{space: {noise.sigma_1: {kind: log, low: 0.5, high: 2}}, num_trials: 3, num_samples: 20}"
    search = (f"search={space}", "search.reduction_factor=2")
    config = tiny(folder / "store", *settings, *lengths, *search)
    (folder / "tiny.yaml").write_text(to_yaml(config))
    dataset = digits(config, folder / "store" / "datasets")
    with ray_driver(config) as (driver, joining):
        command = [sys.executable, "-m", "ncsn", "search", "--config", str(folder / "tiny.yaml"), "--run", "hunt"]
        command += ["--dataset", dataset]
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | joining)
            deadline = time.monotonic() + 600
            while not rung_files(folder) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            process.kill()
            process.wait()
        before = rung_files(folder)
        assert before, (folder / "log.txt").read_text()[-3000:]
        result = driver(do, "search", config, run="hunt", dataset=dataset)
        yield Searched(config, dataset, before, result, driver)


def test_every_trial_has_an_end_and_what_was_reached_before_is_not_done_again(searched: Searched) -> None:
    after = rung_files(Path(searched.result.uri))
    assert len(after) > len(searched.before)
    assert {path: after[path] for path in searched.before} == searched.before
    assert [row["trial"] for row in searched.result.trials] == [0, 1, 2]
    for row in searched.result.trials:
        assert row["images_seen"] in {"finished": [128], "stopped": [32, 64]}[row["status"]]


def test_epsilon_costs_no_training(searched: Searched) -> None:
    """Each rung has three epsilons for one checkpoint and a fixed NFE; a trial keeps its newest checkpoint."""
    for path in map(Path, rung_files(Path(searched.result.uri))):
        rung = json.loads(path.read_text())
        *older, newest = sorted(each.name for each in (path.parent / "checkpoints").glob("images-*"))
        assert newest >= rung["checkpoint"], "a trial that was killed may have trained further than it was scored"
        killed = any(Path(each).parent == path.parent for each in searched.before)
        assert not older or killed, "a trial that was killed may not have deleted the one before"
        epsilons = [scored["sampler"]["epsilon"] for scored in rung["sweep"]]
        assert epsilons == sorted(set(epsilons)) and len(epsilons) == 3
        assert {scored["sampler"]["steps_per_level"] for scored in rung["sweep"]} == {2}
        assert rung["objective"] == min(scored["objective"] for scored in rung["sweep"] if scored["objective"])


def test_the_best_is_a_config_to_train_which_the_component_hands_over(searched: Searched, tmp_path: Path) -> None:
    result = searched.result
    finished = {row["objective"]: row["values"] for row in result.trials if row["status"] == "finished"}
    assert result.objective == min(finished)
    assert {"noise.sigma_1": 1.0} in finished.values() and result.objective <= result.baseline, "the config as it is"
    best = from_yaml(Path(result.config).read_text())
    assert best.search is None and best.noise.sigma_1 == result.values["noise.sigma_1"]
    assert asdict(best.sampling.sampler) == result.sampler
    assert (result.run, result.objective_name) == ("hunt-best", "eval/classifier_fid_n20")
    assert len(json.loads(Path(result.table).read_text())["trials"]) == 3
    assert {Path(plot).name for plot in result.plots} == {"coordinates.png", "epsilon.png"}
    outputs = {"search": dsl.Artifact, "plots": dsl.HTML, "metrics": dsl.Metrics}
    artifacts = {name: kind(uri=str(tmp_path / name)) for name, kind in outputs.items()}
    handed_over, run = component.python_func(
        config=to_json(searched.config),
        run="hunt",
        dataset=dsl.Dataset(uri=str(tmp_path / "dataset"), metadata={"uri": searched.dataset}),
        task_config=dsl.TaskConfig(),
        **artifacts,
    )
    assert (from_yaml(handed_over), run) == (best, "hunt-best")
    measured = {"search/objective": result.objective, "search/baseline": result.baseline}
    assert artifacts["metrics"].metadata == measured
    assert (tmp_path / "plots").read_text().count("data:image/png;base64,") == 2


def test_each_trial_is_a_run_below_that_of_the_step(searched: Searched) -> None:
    connection = connect(searched.config)
    runs = connection.client.search_runs([connection.experiment_id])
    (step,) = [run for run in runs if run.data.tags.get("ncsn.step") == "search"]
    trials = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == step.info.run_id}
    assert len(trials) == len(searched.result.trials)
    for row in searched.result.trials:
        run = trials[f"trial-{row['trial']:03d}"]
        assert run.data.params == {path: str(value) for path, value in row["values"].items()}
        assert run.data.tags["search.status"] == row["status"]
        assert run.info.status == "FINISHED"
        history = connection.client.get_metric_history(run.info.run_id, searched.result.objective_name)
        assert [point.step for point in history] == [each for each in (32, 64, 128) if each <= row["images_seen"]]
    assert step.data.metrics[searched.result.objective_name] == pytest.approx(searched.result.objective)


def test_a_search_that_is_complete_is_returned_also_where_its_store_was_moved_to(searched: Searched) -> None:
    root = Path(searched.config.storage.root)
    assert do("search", searched.config, "hunt", dataset=searched.dataset) == searched.result
    moved = root.rename(root.with_name("moved"))
    there = from_yaml(to_yaml(searched.config), overrides=[f"storage.root={moved}"])
    again = do("search", there, "hunt", dataset=searched.dataset.replace(f"{root}/", f"{moved}/"))
    moved.rename(root)
    assert search.trainable(searched.result, there).storage.root == str(moved)
    assert storage.relative_uris(asdict(again), str(moved)) == storage.relative_uris(asdict(searched.result), str(root))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_of_two_workers_take_turns(searched: Searched) -> None:
    """Ray Train inside a trial: on two cores there is room for one such trial, and none waits for another's cores."""
    config = from_yaml(to_yaml(searched.config), overrides=["compute.num_workers=2", "search.num_trials=3"])
    result = searched.driver(do, "search", config, run="pairs", dataset=searched.dataset)
    assert [row["trial"] for row in result.trials] == [0, 1, 2]
    assert {row["status"] for row in result.trials} <= {"finished", "stopped"}
    assert result.trials[0]["status"] == "finished"
    rungs = rung_files(Path(result.uri))
    assert {json.loads(text)["images_seen"] for text in rungs.values()} == {32, 64, 128}


def trial(number: int, *reached: tuple[int, float], failure: str | None = None, **values: float) -> TrialRecord:
    sampler = {"kind": "annealed_langevin", "steps_per_level": 10, "denoise": True, "consistent": False}
    near, far, diverged = (sampler | {"epsilon": epsilon} for epsilon in (8e-5, 9e-5, 1e-2))
    rungs = tuple(
        Rung(
            images_seen=images,
            objective=objective,
            sampler=near,
            sweep=[Scored(near, objective), Scored(far, objective + 1), Scored(diverged, None)],
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


def test_the_furthest_come_first_and_the_earlier_of_equals_or_the_reason_why_there_is_none() -> None:
    early, far, as_far = trial(0, (10, 1.0)), trial(1, (10, 5.0), (40, 3.0)), trial(2, (10, 5.0), (40, 3.0))
    further_but_failed = trial(3, (10, 0.1), (40, 0.1), failure="it diverged")
    assert search.best_trial([early, as_far, far, further_but_failed], accidents={}) is far
    assert search.best_trial([early, further_but_failed], accidents={}) is early
    for failed, accidents, reason in (
        ([trial(0, failure="training diverged: loss nan"), trial(1)], {}, "loss nan"),
        ([trial(1)], {"trial-1": "Traceback ...\nNodeDied: gone\n"}, "NodeDied: gone"),
    ):
        with refused("search.space") as caught:
            search.best_trial(failed, accidents=accidents)
        assert reason in str(caught.value)


def test_trials_that_failed_are_in_the_table_and_hinder_neither_plots_nor_the_baseline() -> None:
    trials = [trial(0, (10, 5.0), (40, 3.0)), trial(1, failure="too far", sigma_1=9.0), trial(2)]
    config = from_yaml((Path(__file__).parents[2] / "configs" / "digits.yaml").read_text(), overrides=["search={}"])
    plan = SearchPlan(config=config, dataset="", trials="")
    baselines = [search.baseline_objective(plan, trials, images_seen=seen) for seen in (40, 160)]
    assert baselines == [4.0, None], "scored by its own sampler"
    assert search.baseline_objective(plan, [trial(1, (40, 2.0), sigma_1=2.0)], images_seen=40) is None
    rows = search.table(trials, accidents={"trial-2": "lost"})
    assert [(row["trial"], row["status"], row["objective"], row["seconds"], row["reason"]) for row in rows] == [
        (0, "finished", 3.0, 3.0, ""),
        (1, "failed", None, 0, "too far"),
        (2, "unfinished", None, 0, "lost"),
    ]
    drawn = search.pictures(trials, trials[0], "eval/classifier_fid_n256")
    assert set(drawn) == {"coordinates.png", "epsilon.png"}
    for png in drawn.values():
        assert np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).std() > 0
