"""One step of a run, as the commands do it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ncsn.config import Config
from ncsn.kubeflow.task import Task
from ncsn.runs.folder import Run, RunFolder
from ncsn.steps.execute import execute
from ncsn.steps.results import result_type

_OPTIONS = {"finish", "lease", "observer"}


def do(step: str, config: Config, run: str, **given: Any) -> Any:
    """The result of a step, of which `given` are URIs of inputs and options."""
    options = {name: given.pop(name) for name in _OPTIONS & given.keys()}
    return execute(step, Run(config, run), given=given, **options)


def claimed(config: Config, run: str) -> RunFolder:
    """The folder of a run whose name belongs to the config."""
    mine = Run(config, run)
    mine.claim()
    return mine.folder


def do_as_task(step: str, config: Config, run: str, **given: Any) -> Any:
    """The same in a task of KFP."""
    mine = Run(config, run)
    return execute(step, mine, Task(step, mine, last=False), given=given)


def result_of(step: str, **known: Any) -> dict[str, Any]:
    """The record of a result without notes of which the other fields are None."""
    names = (each.name for each in fields(result_type(step)))  # type: ignore[arg-type]
    return {name: [] if name == "notes" else None for name in names} | known
