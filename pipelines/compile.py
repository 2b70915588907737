"""Compiles the pipelines to the YAML that KFP runs: `python -m pipelines.compile [FOLDER]`.

Sizes and retries of pods are set in the YAML and not on the tasks: `kfp.local`, which runs the same pipelines on one
machine, knows no sizes and would retry a mistake.
"""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from ncsn.config import Config
from ncsn.config.compute import bytes_of
from ncsn.environment import WORKER_MEMORY
from ncsn.remote.manifest import GPU
from ncsn.runs.steps import STEP_TABLE, Step
from pipelines.definitions import sample_pipeline, synthesize_pipeline, train_pipeline

SLIM_IMAGE = os.environ.get("NCSN_SLIM_IMAGE")  # of the tasks that need no torch; without it the one of all others
COMPILED = Path(__file__).parent / "compiled"
PIPELINES = {
    "train_pipeline": train_pipeline,
    "sample_pipeline": sample_pipeline,
    "synthesize_pipeline": synthesize_pipeline,
}

# For pods that are evicted or lost. KFP leaves it to Argo's configuration what else is retried; a mistake, which the
# task finds recorded, costs seconds.
RETRIES = {
    "maxRetryCount": 2,
    "backoffDuration": "10s",
    "backoffFactor": 2.0,
    # Argo counts from the start of the first try, and the next may take no longer: above compute.kuberay.max_hours.
    "backoffMaxDuration": "34560000s",
}


def _size(request: tuple[str, str], limit: tuple[str, str], *, gpus: int = 0) -> dict[str, Any]:
    """What one pod asks for and may use, CPUs and memory, in the form of a KFP container's spec."""
    resources: dict[str, Any] = {
        "resourceCpuRequest": request[0],
        "resourceMemoryRequest": request[1],
        "resourceCpuLimit": limit[0],
        "resourceMemoryLimit": limit[1],
    }
    if gpus:
        resources["accelerator"] = {"resourceType": GPU, "resourceCount": str(gpus)}
    return resources


# Of a task that waits for the cluster that does its step, or that the config does not ask for.
LAUNCHER = _size(("100m", "512Mi"), ("1", "2Gi"))
# Of a task that may work in its own pod, by a config that is not known yet.
UNKNOWN = _size(("1", "2Gi"), ("8", "16Gi"))

# Before the source of a task, and so before what it imports.
_RUN_CODE = """
import sys
from ncsn.errors import UserError
from ncsn.runs.code import run_code
try:
    run_code({code!r})
except UserError as error:
    sys.exit(f"error: {{error}}")
"""


def compile_all(folder: Path = COMPILED) -> list[Path]:
    """Write `<name>.yaml` of each pipeline into `folder`; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [compile_one(name, folder) for name in PIPELINES]


def compile_one(name: str, folder: Path, config: Config | None = None, *, code: str | None = None) -> Path:
    """Write `<name>.yaml` of one of `PIPELINES` into `folder`; the path.

    `config` is the experiment that it will run, which decides how large its pods are; None if it is not known yet.
    `code` is the URI of an archive, see `ncsn.runs.code`, whose packages the tasks run instead of their image's.
    """
    path = folder / f"{name}.yaml"
    compiler.Compiler().compile(PIPELINES[name], str(path))
    text = path.read_text()
    spec, *platforms = yaml.safe_load_all(text)
    fit(spec, platforms, config)
    if code is not None:
        for executor in spec["deploymentSpec"]["executors"].values():
            command = executor["container"]["command"]
            command[-1] = _RUN_CODE.format(code=code) + command[-1]
    heading = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    path.write_text(heading + yaml.safe_dump_all([spec, *platforms], sort_keys=True))
    return path


def fit(spec: dict[str, Any], platforms: Sequence[dict[str, Any]], config: Config | None) -> None:
    """Set size and retries of every task of a compiled pipeline, in place.

    `platforms` are its documents for Kubernetes, if any; `config` is the experiment, None if it is not known yet.
    """
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                task["retryPolicy"] = dict(RETRIES)
    for component in spec["components"].values():
        if "executorLabel" not in component:
            continue
        label = component["executorLabel"]
        container = spec["deploymentSpec"]["executors"][label]["container"]
        name = label.removeprefix("exec-")
        step = STEP_TABLE.get(name)  # none of the tasks that only begin and end a pipeline
        container["resources"] = dict(LAUNCHER if name == "finish" else _size_of(step, config))
        if SLIM_IMAGE and name == "finish":
            container["image"] = SLIM_IMAGE
        if config is None or step is None or not step.workers:
            continue
        kuberay = config.compute.kuberay
        # A launcher needs no torch if its job is known, as it is not before a search.
        launched = config.compute.backend == "kuberay" and config.train.init_from is None
        if SLIM_IMAGE and config.search is None and (launched or not step.is_part_of(config)):
            container["image"] = SLIM_IMAGE
            if kuberay.memory_per_worker is None:
                container["env"].append({"name": WORKER_MEMORY, "value": f"{_memory(config, step) // 2**20}Mi"})
        if config.compute.backend == "local":
            # The task's own pod computes: it goes where the config wants the workers, and passes nothing on.
            component.pop("taskConfigPassthroughs", None)
            for platform in platforms:
                executor = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][label]
                if kuberay.node_selector:
                    executor["nodeSelector"] = {"labels": dict(kuberay.node_selector)}
                if kuberay.tolerations:
                    executor["tolerations"] = list(kuberay.tolerations)


def _size_of(step: Step | None, config: Config | None) -> dict[str, Any]:
    if step is not None and step.pod is not None:
        return _size(step.pod.request, step.pod.limit)
    if config is None or step is None:
        return UNKNOWN
    compute = config.compute
    if not step.is_part_of(config) or compute.backend != "local":
        return LAUNCHER
    # One CPU and 2 GiB more, for the driver, Ray and MLflow's client.
    workers, given = compute.max_workers, compute.kuberay.memory_per_worker
    memory = bytes_of(given) if given else _memory(config, step)
    amount = (str(workers * compute.cpus_per_worker + 1), f"{round(workers * memory / 2**20) + 2048}Mi")
    return _size(amount, amount, gpus=workers if compute.use_gpu else 0)


def _memory(config: Config, step: Step) -> int:
    from ncsn.model.memory import worker_memory

    # The dataset is not ingested yet: as many images as the larger published ones have.
    return worker_memory(config, step.workers, reference_images=50_000)


if __name__ == "__main__":
    sys.stdout.writelines(f"{path}\n" for path in compile_all(Path(next(iter(sys.argv[1:]), COMPILED))))
