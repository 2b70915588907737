"""What the module of a step and `execute` exchange: its `prepare` returns a `Prepared`, whose work gets a `Context`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ncsn.config import Config
from ncsn.progress import PublishedProgress
from ncsn.runs.folder import RunFolder

if TYPE_CHECKING:
    from ncsn.tracking.mlflow_runs import StepRun

R = TypeVar("R")


@dataclass(frozen=True)
class Context:
    """What the work of a step is given."""

    folder: RunFolder
    progress: PublishedProgress  # ends the work when the launcher of the lease is gone
    tracked: StepRun  # the MLflow run of the step
    lease: str | None  # URI of the launcher's heartbeat
    last_lines: str  # URI for what the workers wrote last, if the step fails


@dataclass(frozen=True)
class Prepared(Generic[R]):
    """A step whose inputs are settled."""

    config: Config
    key: Mapping[str, Any]  # plain values that decide the result
    work: Callable[[Context], R]
    needs: Callable[[R], list[str]] = lambda _: []  # URIs of files without which a result is of no use
    holds: Callable[[R], bool] = lambda _: True  # whether what a result names elsewhere is still there
