"""The compiled pipeline: what is committed is what the source says, and who waits for whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from components import IMAGE
from ncsn.process import KFP_RUN_ID, KFP_WORKFLOW
from pipelines.compile import COMPILED, PIPELINES, compile_all

UPSTREAM = {
    "ingest": set(),
    "tune": {"ingest"},
    "train": {"ingest", "tune"},
    "sample": {"train", "tune"},
    "evaluate": {"ingest", "sample", "tune"},
    "register": {"sample", "evaluate", "tune"},
    "report": {"evaluate", "register", "tune"},
}


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((COMPILED / "train_pipeline.yaml").read_text()))


@pytest.fixture(scope="module")
def spec(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[0]


@pytest.fixture(scope="module")
def platform(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[1]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_committed_yaml_is_current(name: str, tmp_path: Path) -> None:
    compile_all(tmp_path)
    fresh, golden = ((folder / f"{name}.yaml").read_text() for folder in (tmp_path, COMPILED))
    assert fresh == golden, "run `python -m pipelines.compile` and commit the result"


@pytest.fixture(scope="module")
def tasks(spec: dict[str, Any]) -> dict[str, Any]:
    """The steps, which lie inside the exit handler."""
    found: dict[str, Any] = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    return found


def test_tasks_wait_for_what_they_use(tasks: dict[str, Any]) -> None:
    assert {name: set(task.get("dependentTasks", ())) for name, task in tasks.items()} == UPSTREAM


def test_the_end_comes_whatever_happened(spec: dict[str, Any]) -> None:
    root = spec["root"]["dag"]["tasks"]
    assert set(root) == {"exit-handler-1", "finish"}
    assert root["finish"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert root["finish"]["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}


def test_kfp_caches_what_depends_on_its_arguments_alone(spec: dict[str, Any], tasks: dict[str, Any]) -> None:
    cached = {name for name, task in tasks.items() if task["cachingOptions"].get("enableCache")}
    assert cached == {"tune", "train"}
    assert "enableCache" not in spec["root"]["dag"]["tasks"]["finish"]["cachingOptions"]


def test_every_task_has_a_title(spec: dict[str, Any], tasks: dict[str, Any]) -> None:
    for name, task in (tasks | spec["root"]["dag"]["tasks"]).items():
        assert task["taskInfo"]["name"] != name


def test_tasks_install_nothing_at_run_time(spec: dict[str, Any]) -> None:
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor["container"]
        assert container["image"] == IMAGE
        assert "pip" not in " ".join(container["command"][:-1])


def test_tasks_get_addresses_and_secrets_by_reference(spec: dict[str, Any], platform: dict[str, Any]) -> None:
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(executors) == set(spec["deploymentSpec"]["executors"])
    for executor in executors.values():
        (secret,) = executor["secretAsEnv"]
        (config_map,) = executor["configMapAsEnv"]
        assert secret["secretName"] == "ncsn-credentials"
        assert secret["optional"] and config_map["optional"]
        assert {pair["envVar"] for pair in secret["keyToEnv"]} >= {"AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN"}
        assert {pair["envVar"] for pair in config_map["keyToEnv"]} >= {"AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"}
        assert {field["name"] for field in executor["fieldPathAsEnv"]} == {KFP_RUN_ID, KFP_WORKFLOW}
