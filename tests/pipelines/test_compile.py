"""The compiled pipelines: what is committed is what the source says, who waits for whom, and the size of each pod."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp_api import check_spec

from components import IMAGE
from ncsn.config import from_yaml
from ncsn.config.compute import ComputeConfig
from ncsn.process import KFP_RUN_ID, KFP_WORKFLOW
from pipelines.compile import COMPILED, GPU, LAUNCHER, PIPELINES, UNKNOWN, compile_all, compile_one

UPSTREAM = {
    "ingest": set(),
    "tune": {"ingest"},
    "train": {"ingest", "tune"},
    "sample": {"train", "tune"},
    "evaluate": {"ingest", "sample", "tune"},
    "register": {"sample", "evaluate", "tune"},
    "report": {"evaluate", "register", "tune"},
}
DIGITS = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()
COMPUTING = ("train", "sample", "tune")
LARGE = {
    "num_workers": [2, 4],
    "cpus_per_worker": 8,
    "use_gpu": True,
    "kuberay": {
        "memory_per_worker": "16Gi",
        "node_selector": {"pool": "a100"},
        "tolerations": [{"key": GPU, "operator": "Exists"}],
    },
}


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((COMPILED / "train_pipeline.yaml").read_text()))


@pytest.fixture(scope="module")
def spec(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_committed_yaml_is_current_and_complete(name: str, tmp_path: Path) -> None:
    compile_all(tmp_path)
    fresh, golden = ((folder / f"{name}.yaml").read_text() for folder in (tmp_path, COMPILED))
    assert fresh == golden, "run `python -m pipelines.compile` and commit the result"
    spec, platform = yaml.safe_load_all(golden)
    check_spec({"pipeline_spec": spec, "platform_spec": platform})
    for each in resources(spec).values():  # without them a ResourceQuota refuses the pod (Kubernetes 1.34)
        kinds = {f"resource{what}{bound}" for what in ("Cpu", "Memory") for bound in ("Request", "Limit")}
        assert each.keys() >= kinds
    graphs = [each["dag"]["tasks"] for each in (spec["root"], *spec["components"].values()) if "dag" in each]
    for task_name, task in ((task_name, task) for graph in graphs for task_name, task in graph.items()):
        is_task = "executorLabel" in spec["components"][task["componentRef"]["name"]]
        assert ("retryPolicy" in task) == is_task, task_name
        if is_task:
            assert task["taskInfo"]["name"] != task_name, "it has a title"
            longest = float(task["retryPolicy"]["backoffMaxDuration"].removesuffix("s"))
            assert longest > 8760 * 3600, "Argo gives no more than this to the retry of a step of max_hours"


def test_tasks_wait_for_what_they_use_and_the_end_comes_whatever_happened(spec: dict[str, Any]) -> None:
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert {name: set(task.get("dependentTasks", ())) for name, task in tasks.items()} == UPSTREAM
    root = spec["root"]["dag"]["tasks"]
    assert set(root) == {"exit-handler-1", "finish"}
    assert root["finish"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert root["finish"]["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}


def test_tasks_install_nothing_and_get_addresses_and_secrets_by_reference(documents: list[dict[str, Any]]) -> None:
    spec, platform = documents
    for executor in spec["deploymentSpec"]["executors"].values():
        assert executor["container"]["image"] == IMAGE
        assert "pip" not in " ".join(executor["container"]["command"][:-1])
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(executors) == set(spec["deploymentSpec"]["executors"])
    for executor in executors.values():
        (secret,), (config_map,) = executor["secretAsEnv"], executor["configMapAsEnv"]
        assert secret["secretName"] == "ncsn-credentials"
        assert secret["optional"] and config_map["optional"]
        assert {pair["envVar"] for pair in secret["keyToEnv"]} >= {"AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN"}
        assert {pair["envVar"] for pair in config_map["keyToEnv"]} >= {"AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"}
        assert {field["name"] for field in executor["fieldPathAsEnv"]} == {KFP_RUN_ID, KFP_WORKFLOW}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_task_that_computes_has_its_shared_memory_in_memory(name: str) -> None:
    _, platform = yaml.safe_load_all((COMPILED / f"{name}.yaml").read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    mounted = {label.removeprefix("exec-"): each.get("emptyDirMounts", []) for label, each in executors.items()}
    shm = {"volumeName": "shm", "mountPath": "/dev/shm", "medium": "Memory"}
    computing = {"tune", "train", "sample", "evaluate"} & mounted.keys()
    assert len(computing) >= 2
    assert {task: found for task, found in mounted.items() if found} == {task: [shm] for task in computing}


def fitted(tmp_path: Path, *, searching: bool = True, **compute: object) -> tuple[Any, Any]:
    """The pipeline and its pods for a large experiment."""
    sized = ComputeConfig.model_validate(LARGE | compute)
    config = from_yaml(DIGITS).model_copy(update={"compute": sized, "search": object() if searching else None})
    spec, platform = yaml.safe_load_all(compile_one("train_pipeline", tmp_path, config).read_text())
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def resources(spec: Any) -> dict[str, dict[str, Any]]:
    executors = spec["deploymentSpec"]["executors"]
    return {label.removeprefix("exec-"): each["container"]["resources"] for label, each in executors.items()}


def test_a_launcher_is_small_and_a_config_that_is_not_known_leaves_room(tmp_path: Path, spec: dict[str, Any]) -> None:
    for backend in ("kuberay", "ray-jobs"):
        launched, _ = fitted(tmp_path, backend=backend)
        for task in COMPUTING:
            assert resources(launched)[task] == LAUNCHER
            assert launched["components"][f"comp-{task}"]["taskConfigPassthroughs"]
    assert resources(spec)["train"] == UNKNOWN


def test_only_tasks_that_need_no_torch_get_the_slim_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.compile.SLIM_IMAGE", "slim:1")

    def slim(**settings: Any) -> dict[str, dict[str, str]]:
        """The tasks with the slim image and their variables."""
        spec, _ = fitted(tmp_path, **settings)
        containers = {name: each["container"] for name, each in spec["deploymentSpec"]["executors"].items()}
        assert {each["image"] for each in containers.values()} == {IMAGE, "slim:1"}
        return {
            name.removeprefix("exec-"): {each["name"]: each["value"] for each in container["env"]}
            for name, container in containers.items()
            if container["image"] == "slim:1"
        }

    launched = slim(backend="kuberay", searching=False)
    assert launched.keys() == {"finish", "tune", "train", "sample", "evaluate"}
    assert all(each["NCSN_IMAGE"] == IMAGE for each in launched.values()), "what they start has torch"
    assert "NCSN_WORKER_MEMORY" not in launched["train"], "the config says it"
    sized = slim(backend="kuberay", searching=False, kuberay={})
    assert re.fullmatch(r"\d{4,}Mi", sized["train"]["NCSN_WORKER_MEMORY"])
    assert slim(backend="kuberay").keys() == {"finish"}, "the search decides about the others"
    assert slim(searching=False).keys() == slim(backend="ray-jobs", searching=False).keys() == {"finish", "tune"}
    spec, _ = yaml.safe_load_all(compile_one("train_pipeline", tmp_path).read_text())
    images = {name: each["container"]["image"] for name, each in spec["deploymentSpec"]["executors"].items()}
    assert [name for name, image in images.items() if image == "slim:1"] == ["exec-finish"]


def test_a_task_that_works_itself_is_as_large_as_its_workers(tmp_path: Path) -> None:
    spec, executors = fitted(tmp_path)
    for task in COMPUTING:
        found = resources(spec)[task]
        assert found["resourceCpuLimit"] == found["resourceCpuRequest"] == "33"
        assert found["resourceMemoryLimit"] == f"{(4 * 16 + 2) * 1024}Mi"
        assert found["accelerator"] == {"resourceType": GPU, "resourceCount": "4"}
        assert executors[f"exec-{task}"]["nodeSelector"] == {"labels": {"pool": "a100"}}
        assert executors[f"exec-{task}"]["tolerations"] == [{"key": GPU, "operator": "Exists"}]
        assert "taskConfigPassthroughs" not in spec["components"][f"comp-{task}"], "they would keep it off the pod"
    assert "accelerator" not in resources(spec)["ingest"]
    assert "nodeSelector" not in executors["exec-ingest"]
    spec, _ = fitted(tmp_path, searching=False)
    assert resources(spec)["tune"] == LAUNCHER
    assert "accelerator" in resources(spec)["train"]
