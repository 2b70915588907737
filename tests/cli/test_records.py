"""What a run's folder says of its steps, and when a whole run counts as done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refused import refused

from ncsn import storage
from ncsn.cli.execute import complete_records, mark_complete
from ncsn.cli.options import CATALOGUE
from ncsn.cli.target import find_inputs, resolve
from ncsn.config import Config, from_yaml
from ncsn.errors import Problem
from ncsn.runs.folder import STEPS, RunFolder, claim_run
from ncsn.runs.records import StepError, forget_attempts, read_error, read_progress, read_results


@pytest.fixture
def config(config_file: Path) -> Config:
    return resolve(str(config_file)).config


@pytest.fixture
def folder(config: Config) -> RunFolder:
    return claim_run(config, "mine")


def store_result(folder: RunFolder, step: str, result: dict[str, object], *, at: str = "2026-01-01") -> None:
    record = {"step": step, "inputs": {}, "result": result, "seconds": 1.5, "finished_at": at}
    storage.write_text(folder.step(step, "result.json"), json.dumps(record))


def finish_all(folder: RunFolder) -> str:
    """Results of all steps; the URI of an output of the first."""
    output = storage.join(folder.uri, "data")
    storage.write_text(output, "x")
    for step in STEPS:
        store_result(folder, step, {"uri": output if step == "ingest" else "models:/m/1"})
    return output


def test_the_catalogue_follows_the_pipeline() -> None:
    assert tuple(step for step in CATALOGUE if step != "tune") == STEPS


def test_a_run_is_complete_only_for_its_config_results_and_outputs(config: Config, folder: RunFolder) -> None:
    output = finish_all(folder)
    assert complete_records(folder, config) is None
    marked = mark_complete(folder, config)
    assert complete_records(folder, config) == marked
    assert list(marked) == list(STEPS)

    other = from_yaml(storage.read_text(folder.config), overrides=["sampling.num_images=9"])
    assert complete_records(folder, other) is None

    store_result(folder, "sample", {"uri": "elsewhere"}, at="2026-01-02")
    assert complete_records(folder, config) is None

    mark_complete(folder, config)
    assert complete_records(folder, config) is not None
    Path(output).unlink()
    assert complete_records(folder, config) is None


def test_earlier_attempts_are_forgotten_and_results_kept(folder: RunFolder) -> None:
    store_result(folder, "ingest", {"uri": "x"})
    problem = Problem("data.root", "no folder", value="/x")
    error = {"type": "NotFound", "user": True, "message": str(problem), "problems": [problem.to_json()]}
    storage.write_text(folder.step("train", "error.json"), json.dumps(error))
    storage.write_text(folder.step("train", "progress.json"), json.dumps({"done": 1, "total": 2, "unit": "images"}))
    assert read_error(folder, "train") == StepError("NotFound", str(problem), mistake=True, problems=(problem,))
    forget_attempts(folder)
    assert read_error(folder, "train") is None
    assert read_progress(folder, "train") is None
    assert list(read_results(folder)) == ["ingest"]


def test_inputs_are_the_given_ones_else_those_of_the_run(folder: RunFolder) -> None:
    store_result(folder, "ingest", {"uri": "/data/set"})
    store_result(folder, "sample", {"uri": "/samples"})
    found = find_inputs(folder, "evaluate", {"samples": "/other/", "dataset": None})
    assert found == {"samples": "/other", "dataset": "/data/set"}


def test_a_missing_input_names_the_step_to_run(folder: RunFolder) -> None:
    with refused("--checkpoint") as caught:
        find_inputs(folder, "sample", {"checkpoint": None})
    assert "`ncsn train`" in caught.value.problems[0].hint


@pytest.mark.parametrize("damaged", ["", '{"done": 1, "to'])
def test_progress_that_does_not_parse_is_passed_over(folder: RunFolder, damaged: str) -> None:
    storage.write_text(folder.step("train", "progress.json"), damaged)
    assert read_progress(folder, "train") is None
