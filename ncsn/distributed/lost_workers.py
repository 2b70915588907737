"""What Ray Train's controller says when workers fail: one line, where its own log has a hundred."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayActorError
from ray.train import TrainingFailedError, UserCallback

from ncsn import storage
from ncsn.model.checkpoint_store import CHECKPOINTS, SNAPSHOT
from ncsn.storage.retry import limited

_logger = logging.getLogger(__name__)


class LostWorkers(UserCallback):  # type: ignore[misc]
    """Says what happened and where training resumes, unless it does not.

    Args:
        run_uri: Folder of the run.
        max_failures: How often Ray Train starts the workers again.
    """

    def __init__(self, run_uri: str, *, max_failures: int) -> None:
        self._run_uri, self._left = run_uri, max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002 - Ray's
        """Called in the controller before it decides; see `UserCallback`."""
        if not any(getattr(_cause(error), "preempted", False) for error in worker_exceptions.values()):
            self._left -= 1  # Ray Train starts again without end after preemptions
        if self._left >= 0:
            _logger.warning(
                "%s, training resumes from %s", describe(worker_exceptions), _latest_checkpoint(self._run_uri)
            )


def describe(errors: Mapping[int, Exception]) -> str:
    """What befell the workers, by rank: a lost one makes the others fail too, so it goes first."""
    if any(isinstance(_cause(error), RayActorError) for error in errors.values()):
        return "worker lost"
    rank, error = min(errors.items())
    first = next(iter(str(error).strip().splitlines()), "")
    return f"worker {rank} failed with {type(error).__name__}: {first}"


def reason(failure: TrainingFailedError) -> str:
    """Why Ray Train gave up, in one line."""
    if errors := getattr(failure, "worker_failures", None):
        return describe(errors)
    cause = getattr(failure, "controller_failure", failure)
    return f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')}"


def _cause(error: Exception) -> Exception:
    """What is in Ray Train's report of a worker that did not answer."""
    cause: Exception = getattr(error, "health_check_failure", error)
    return cause


def _latest_checkpoint(run_uri: str) -> str:
    try:
        with limited(0):
            latest = storage.read_json(storage.join(run_uri, CHECKPOINTS, SNAPSHOT))["latest_checkpoint_result"]
    except FileNotFoundError:
        latest = None
    except OSError:
        return "its last checkpoint"
    return str(latest["checkpoint_dir_name"]) if latest else "the start"
