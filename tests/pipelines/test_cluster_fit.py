"""The pods of every task have sizes, from the config where the task works itself, and lost ones are tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ncsn.config import from_yaml
from ncsn.config.compute import ComputeConfig
from pipelines.compile import GPU, LAUNCHER, PIPELINES, UNKNOWN, compile_one

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


def fitted(
    tmp_path: Path, name: str = "train_pipeline", *, compute: ComputeConfig | None = None, searching: bool = True
) -> tuple[Any, Any]:
    config = None
    if compute is not None:
        config = from_yaml(DIGITS).model_copy(update={"compute": compute, "search": object() if searching else None})
    spec, platform = yaml.safe_load_all(compile_one(name, tmp_path, config).read_text())
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def resources(spec: Any) -> dict[str, dict[str, Any]]:
    executors = spec["deploymentSpec"]["executors"]
    return {label.removeprefix("exec-"): each["container"]["resources"] for label, each in executors.items()}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pod_has_requests_and_limits_and_is_tried_again(name: str, tmp_path: Path) -> None:
    """Without them a ResourceQuota refuses the pod (Kubernetes 1.34)."""
    spec, _ = fitted(tmp_path, name)
    for each in resources(spec).values():
        assert each.keys() >= {
            "resourceCpuRequest",
            "resourceCpuLimit",
            "resourceMemoryRequest",
            "resourceMemoryLimit",
        }
    graphs = [each["dag"]["tasks"] for each in (spec["root"], *spec["components"].values()) if "dag" in each]
    for task_name, task in ((task_name, task) for graph in graphs for task_name, task in graph.items()):
        is_task = "executorLabel" in spec["components"][task["componentRef"]["name"]]
        assert ("retryPolicy" in task) == is_task, task_name
        if is_task:
            longest = float(task["retryPolicy"]["backoffMaxDuration"].removesuffix("s"))
            assert longest > 8760 * 3600, "Argo gives no more than this to the retry of a step of max_hours"


def test_a_launcher_is_small(tmp_path: Path) -> None:
    for backend in ("kuberay", "ray-jobs"):
        spec, _ = fitted(tmp_path, compute=ComputeConfig.model_validate(LARGE | {"backend": backend}))
        for task in COMPUTING:
            assert resources(spec)[task] == LAUNCHER
            assert spec["components"][f"comp-{task}"]["taskConfigPassthroughs"]


def test_a_task_that_works_itself_is_as_large_as_its_workers(tmp_path: Path) -> None:
    spec, executors = fitted(tmp_path, compute=ComputeConfig.model_validate(LARGE))
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


def test_a_search_that_nobody_asks_for_reserves_nothing(tmp_path: Path) -> None:
    spec, _ = fitted(tmp_path, compute=ComputeConfig.model_validate(LARGE), searching=False)
    assert resources(spec)["tune"] == LAUNCHER
    assert "accelerator" in resources(spec)["train"]


def test_a_config_that_is_not_known_leaves_room(tmp_path: Path) -> None:
    spec, _ = fitted(tmp_path)
    assert resources(spec)["train"] == UNKNOWN
