"""The compiled pipeline: what is committed is what the source says, and who waits for whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from components import IMAGE
from pipelines.compile import COMPILED, PIPELINES, compile_all

UPSTREAM = {
    "ingest": set(),
    "train": {"ingest"},
    "sample": {"train"},
    "evaluate": {"ingest", "sample"},
    "register": {"train", "evaluate"},
}


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((COMPILED / "train_pipeline.yaml").read_text())
    return loaded


@pytest.mark.parametrize("name", PIPELINES)
def test_the_committed_yaml_is_current(name: str, tmp_path: Path) -> None:
    compile_all(tmp_path)
    fresh, golden = ((folder / f"{name}.yaml").read_text() for folder in (tmp_path, COMPILED))
    assert fresh == golden, "run `python -m pipelines.compile` and commit the result"


def test_tasks_wait_for_what_they_use(spec: dict[str, Any]) -> None:
    tasks = spec["root"]["dag"]["tasks"]
    assert {name: set(task.get("dependentTasks", ())) for name, task in tasks.items()} == UPSTREAM


def test_kfp_does_not_cache_and_every_task_has_a_title(spec: dict[str, Any]) -> None:
    for name, task in spec["root"]["dag"]["tasks"].items():
        assert "enableCache" not in task["cachingOptions"]
        assert task["taskInfo"]["name"] != name


def test_tasks_install_nothing_at_run_time(spec: dict[str, Any]) -> None:
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor["container"]
        assert container["image"] == IMAGE
        assert "pip" not in " ".join(container["command"][:-1])
