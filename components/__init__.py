"""What the tasks of the pipelines, in `components.tasks`, share.

A component passes the canonical config, the name of the run and the URIs of its inputs to one function of `ncsn.steps`.
The data is in the store; a KFP artifact is the step's result as JSON, with the URIs in its metadata.
"""

import base64
import dataclasses
import json
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from kfp import dsl

IMAGE = os.environ.get("NCSN_IMAGE", "ncsn-python:0.1.0")  # of every task, read at compile time


def config_and_run(config: str, run: str) -> tuple[Any, str]:
    """The config of a task, and the run's name: `run`, else the config's name and the id of KFP's run.

    Tasks call it before they import their step, which makes those imports faster.
    """
    from ncsn.environment import KFP_RUN_ID
    from ncsn.process import reduce_gc, settle

    reduce_gc()
    settle()
    from ncsn.config import from_yaml
    from ncsn.errors import UserError

    settings = from_yaml(config)
    if not run and not os.environ.get(KFP_RUN_ID):
        raise UserError("run", f"empty, and {KFP_RUN_ID} is not set", hint="set this parameter to a name")
    return settings, run or f"{settings.name}-{os.environ[KFP_RUN_ID][:8]}"


def run_task(
    step: str,
    config: str,
    run: str,
    *,
    last: bool = False,
    task_config: dsl.TaskConfig | None = None,
    **inputs: dsl.Artifact,
) -> Any:
    """The result of a task's step, of which `config`, `run` and the artifacts are the parameters.

    The pipeline ends with the `last` task. `task_config` is what KFP holds for the pods that the task may start.
    """
    settings, name = config_and_run(config, run)
    from ncsn.kubeflow.task import Task
    from ncsn.runs.run import Run, default_checkpoint
    from ncsn.runs.steps import STEP_TABLE
    from ncsn.steps.execute import execute

    if task_config is not None:
        pass_on(task_config, settings)
    work = Run(settings, name)
    given = {name: artifact.metadata["uri"] for name, artifact in inputs.items()}
    source = STEP_TABLE[step].inputs.get("checkpoint")
    if source is not None and source.selectable:  # `ncsn select` may have chosen another one since the task before
        given["checkpoint"] = default_checkpoint(work.folder, last=given["checkpoint"])
    return execute(step, work, Task(step, work, last=last), given=given)


def pass_on(task_config: dsl.TaskConfig, settings: Any) -> None:
    """Pass what KFP holds for the pods that the task starts to the backend that starts them.

    Raises:
        UserError: The task starts no pods, so these settings would be lost.
    """
    from ncsn.errors import UserError
    from ncsn.remote.manifest import TASK_CONFIG

    given = {name: value for name, value in dataclasses.asdict(task_config).items() if value}
    for_other_pods = sorted(given.keys() & {"node_selector", "tolerations", "affinity"})
    if for_other_pods and settings.compute.backend != "kuberay":
        reason = f"starts no pods, so it has no use for the task's {', '.join(for_other_pods)}"
        raise UserError("compute.backend", reason, hint="set it to kuberay", value=settings.compute.backend)
    os.environ[TASK_CONFIG] = json.dumps(given)


def publish(artifact: dsl.Artifact, result: Any, **metadata: str) -> None:
    """Write `result`, a frozen dataclass, as JSON, and attach `metadata` for the tasks that follow."""
    Path(artifact.path).write_text(json.dumps(dataclasses.asdict(result), indent=1))
    artifact.metadata.update(metadata)


def read_own(config: str, uri: str) -> bytes:
    """A file of the store, or of the export, that a result names."""
    from ncsn import storage
    from ncsn.config import from_yaml

    settings = from_yaml(config)
    out = settings.export.out and storage.absolute(settings.export.out)
    root = out if out and uri.startswith(out) else storage.absolute(settings.storage.root)
    return storage.read_below(root, uri)


def publish_nothing(*artifacts: dsl.Artifact) -> None:
    """Write empty files: KFP's page shows an artifact without one as broken."""
    for artifact in artifacts:
        Path(artifact.path).write_text("null")


def publish_metrics(metrics: dsl.Metrics, values: Mapping[str, float | None]) -> None:
    """Log the numbers, and write a file: KFP's local cache treats an artifact without one as lost."""
    known = {name: float(value) for name, value in values.items() if value is not None}
    for name, value in known.items():
        metrics.log_metric(name, value)
    Path(metrics.path).write_text(json.dumps(known, indent=1))


def publish_pictures(page: dsl.HTML, pictures: Mapping[str, bytes]) -> None:
    """Write PNGs by caption as one self-contained page; KFP shows it in a frame that cannot fetch anything."""
    figures = (
        f'<figure><img style="image-rendering: pixelated; max-width: 100%" alt="{escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"><figcaption>{escape(caption)}</figcaption></figure>'
        for caption, png in pictures.items()
    )
    Path(page.path).write_text(f'<!doctype html><meta charset="utf-8">{"".join(figures)}')
