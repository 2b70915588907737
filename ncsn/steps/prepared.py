"""What the module of a step and `execute` exchange."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ncsn.config import Config
from ncsn.progress import PublishedProgress
from ncsn.runs.layout import RunFolder
from ncsn.runs.results import Result
from ncsn.runs.steps import STEP_TABLE

if TYPE_CHECKING:
    from ncsn.tracking.mlflow_runs import StepRun

R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Context:
    """What the work of a step is given."""

    folder: RunFolder
    progress: PublishedProgress  # ends the work when the launcher of the lease is gone
    tracked: StepRun  # the MLflow run of the step
    lease: str | None  # URI of the launcher's heartbeat
    last_lines: str  # URI for what the workers wrote last, if the step fails


@dataclass(frozen=True)
class Prepared(ABC, Generic[R]):
    """A step whose inputs are settled: what its `prepare` returns. Each step adds the fields that its work needs."""

    config: Config
    key: Mapping[str, Any]  # plain values that decide the result

    @abstractmethod
    def work(self, context: Context) -> R:
        """Do the step."""

    def files(self, result: R) -> list[str]:
        """URIs of the files without which a result is of no use."""
        named = (getattr(result, field) for field in STEP_TABLE[result.step].files)
        return [uri for uris in named for uri in ([uris] if isinstance(uris, str) else uris)]

    def stands(self, result: R) -> bool:  # noqa: ARG002
        """Whether what a result names outside the store is still there."""
        return True
