"""The compiled pipelines: what is committed, which is there to be reviewed, is what the source says; sizes of pods."""

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
from ncsn.environment import KFP_RUN_ID, KFP_WORKFLOW
from pipelines.compile import COMPILED, GPU, LAUNCHER, PIPELINES, UNKNOWN, compile_all, compile_one
from pipelines.definitions import ADDRESSES, SECRETS

REPOSITORY = Path(__file__).parents[2]
DIGITS = (REPOSITORY / "configs" / "digits.yaml").read_text()
VARIABLE = re.compile(r'"((?:AWS|NCSN)_[A-Z_0-9]+)"')
# Of the machine of a person or of a cluster, or set for each task.
PERSONAL = {
    *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "NCSN_DASHBOARD", "NCSN_TRACEBACK"),
    *("NCSN_IMAGE", "NCSN_SLIM_IMAGE", "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_UI_ENDPOINT"),
    *("NCSN_KFP_TOKEN", "NCSN_KFP_COOKIE", "KF_PIPELINES_SA_TOKEN_PATH"),
}
COMPUTING = ("train", "sample", "search")
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


def test_whatever_happened_the_end_comes_and_nothing_is_installed() -> None:
    spec, platform = yaml.safe_load_all((COMPILED / "train_pipeline.yaml").read_text())
    finish = spec["root"]["dag"]["tasks"]["finish"]
    assert finish["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert finish["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for label, executor in spec["deploymentSpec"]["executors"].items():
        assert executor["container"]["image"] == IMAGE
        assert "pip" not in " ".join(executor["container"]["command"][:-1])
        (secret,), (config_map,) = executors[label]["secretAsEnv"], executors[label]["configMapAsEnv"]
        assert secret["secretName"] == "ncsn-credentials" and secret["optional"] and config_map["optional"]
        assert {field["name"] for field in executors[label]["fieldPathAsEnv"]} == {KFP_RUN_ID, KFP_WORKFLOW}


def test_tasks_get_what_the_config_map_gives_to_the_pods_of_ray() -> None:
    """KFP names each key: those of the manifest, also in comments, and those that docs and store name."""
    manifest = (REPOSITORY / "infra/base/kuberay/environment.yaml").read_text()
    named = set(re.findall(r"^  (?:# )?([A-Z][A-Z_0-9]+): ", manifest, flags=re.MULTILINE))
    table = (
        (REPOSITORY / "docs/kubernetes.md").read_text().partition("## Environment variables")[2].partition("\n## ")[0]
    )
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    told = {name for row in rows for name in re.findall(r"`([A-Z_0-9]+)`", row)}
    assert {"AWS_ENDPOINT_URL", "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD"} <= named and "NCSN_STORE_PATIENCE" in told
    assert named <= set(ADDRESSES)
    assert told - PERSONAL <= {*ADDRESSES, *SECRETS}
    read = {name for file in (REPOSITORY / "ncsn/storage").glob("*.py") for name in VARIABLE.findall(file.read_text())}
    assert "AWS_ENDPOINT_URL_S3" in read and read <= {*ADDRESSES, *SECRETS}


def fitted(tmp_path: Path, *, searching: bool = True, **compute: object) -> tuple[Any, Any]:
    """The pipeline and its pods for a large experiment."""
    sized = ComputeConfig.model_validate(LARGE | compute)
    config = from_yaml(DIGITS).model_copy(update={"compute": sized, "search": object() if searching else None})
    spec, platform = yaml.safe_load_all(compile_one("train_pipeline", tmp_path, config).read_text())
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def resources(spec: Any) -> dict[str, dict[str, Any]]:
    executors = spec["deploymentSpec"]["executors"]
    return {label.removeprefix("exec-"): each["container"]["resources"] for label, each in executors.items()}


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
    assert launched.keys() == {"finish", "search", "train", "sample", "evaluate", "utility"}
    assert all(each["NCSN_IMAGE"] == IMAGE for each in launched.values()), "what they start has torch"
    assert "NCSN_WORKER_MEMORY" not in launched["train"], "the config says it"
    sized = slim(backend="kuberay", searching=False, kuberay={})
    assert re.fullmatch(r"\d{4,}Mi", sized["train"]["NCSN_WORKER_MEMORY"])
    assert slim(backend="kuberay").keys() == {"finish"}, "the search decides about the others"
    idle = {"finish", "search", "utility"}
    assert slim(searching=False).keys() == slim(backend="ray-jobs", searching=False).keys() == idle
    spec, _ = yaml.safe_load_all(compile_one("train_pipeline", tmp_path).read_text())
    images = {name: each["container"]["image"] for name, each in spec["deploymentSpec"]["executors"].items()}
    assert [name for name, image in images.items() if image == "slim:1"] == ["exec-finish"]


def test_a_launcher_is_small_and_a_task_that_works_itself_as_large_as_its_workers(tmp_path: Path) -> None:
    spec, _ = yaml.safe_load_all((COMPILED / "train_pipeline.yaml").read_text())
    assert resources(spec)["train"] == UNKNOWN, "the config is not known"
    for launched, _ in (fitted(tmp_path, backend="kuberay"), fitted(tmp_path, backend="ray-jobs")):
        for task in COMPUTING:
            assert resources(launched)[task] == LAUNCHER
            assert launched["components"][f"comp-{task}"]["taskConfigPassthroughs"]
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
    assert resources(spec)["search"] == resources(spec)["utility"] == LAUNCHER
    assert "accelerator" in resources(spec)["train"]
