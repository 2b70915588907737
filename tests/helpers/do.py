"""One step of a run, as the commands do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_origin, get_type_hints

from ncsn.config import Config
from ncsn.kubeflow.task import Task
from ncsn.runs.layout import RunFolder
from ncsn.runs.metrics import Estimate
from ncsn.runs.record import Finished, update_attempt, write_finished
from ncsn.runs.run import Run
from ncsn.runs.steps import STEP_TABLE
from ncsn.steps.execute import execute
from ncsn.steps.prepared import Context, Prepared

ALWAYS = [name for name, step in STEP_TABLE.items() if step.always]  # the steps of every run
_OPTIONS = {"finish", "lease", "observer"}
_EMPTY = {str: "", int: 0, float: 0.0, bool: False, Estimate: Estimate(0.0, 0.0, 0.0)}


@dataclass(frozen=True)
class Doing(Prepared[Any]):
    """A step whose work is a function."""

    do_it: Callable[[Context], Any]

    def work(self, context: Context) -> Any:
        return self.do_it(context)

    def files(self, result: Any) -> list[str]:
        return [result.uri]


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
    """The values of a result of which only these are known; all others are empty."""
    kind = STEP_TABLE[step].result
    hints = get_type_hints(kind)
    values = {each.name: _EMPTY.get(hints[each.name]) for each in fields(kind)}
    for name in values.keys() - known.keys():
        origin = get_origin(hints[name])
        values[name] = origin() if origin in (list, dict) else values[name]
    return values | known


def recorded(
    folder: RunFolder,
    step: str,
    *,
    result: Mapping[str, Any] | None = None,
    key: Mapping[str, Any] = {},
    finished_at: str = "2026-01-01T00:00:00+00:00",
    **attempt: Any,
) -> None:
    """Record a step as if it had such a result, of which only these values matter, and such a last attempt."""
    if result is not None:
        seconds = attempt.get("seconds", 0.0)
        write_finished(folder, Finished(step, key, result_of(step, **result), finished_at, seconds))
    update_attempt(folder, step, **attempt)
