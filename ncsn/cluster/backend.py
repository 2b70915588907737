"""What a backend is: it runs a step's command somewhere else and returns when it is done.

The command is the same `ncsn <step>` that a person types, with the local backend. Config, result, progress and errors
go through the store, so that a backend carries nothing but the command.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ncsn.config.compute import ComputeConfig


@dataclass(frozen=True)
class RemoteStep:
    """One step to run elsewhere.

    Attributes:
        run: Name of the run.
        step: Name of the step.
        uri: Folder of the step in the store, which keeps its log and the launcher's lease.
        command: Command and arguments, which take `--lease URI` as well.
        mistaken: Whether the step has recorded a mistake since it was started, which another attempt would repeat.
    """

    run: str
    step: str
    uri: str
    command: tuple[str, ...]
    mistaken: Callable[[], bool] = lambda: False


class RemoteFailure(RuntimeError):
    """The step ended elsewhere without success; the message is one line with the reason."""


class RemoteLost(RemoteFailure):
    """The step's record is gone, so nobody can say how it ended; if it did, its result is in the store."""


class Backend(Protocol):
    """Runs steps elsewhere."""

    def execute(self, step: RemoteStep) -> None:
        """Run the step to its end, or attach to it if it is running.

        Raises:
            RemoteFailure: if it ended without success.
            PermissionError: naming the right that is missing.
            ConnectionError: if the other side has not answered for long.
            ValueError: for a mistake in the settings.
        """


def open_backend(compute: ComputeConfig) -> Backend | None:
    """The backend that `compute.backend` names; None for the local one, which is this process."""
    if compute.backend == "local":
        return None
    from ncsn.cluster.kuberay import KubeRay

    return KubeRay(compute)


def say(line: str) -> None:
    """Tell whoever waits. A KFP task's stderr is its log."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
