"""What became of a RayJob, read from its status and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# KubeRay's own helper leaves ValidationFailed out, and who trusts it waits for ever.
_TERMINAL = {"Complete", "Failed", "ValidationFailed"}


@dataclass(frozen=True)
class JobState:
    """The status of a RayJob.

    Attributes:
        deployment: `jobDeploymentStatus`: what the operator does.
        job: `jobStatus`: what the Ray job does.
        reason: Why it failed, one word.
        message: Why it failed, in words.
        failed: Attempts that failed.
    """

    deployment: str
    job: str
    reason: str
    message: str
    failed: int

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.deployment in _TERMINAL

    @property
    def ended_by_operator(self) -> bool:
        """Whether it failed by a limit of the operator and not by what its driver did."""
        return self.reason.endswith("Exceeded") or self.deployment == "ValidationFailed"

    @property
    def starting(self) -> bool:
        """Whether its cluster is being made."""
        return self.deployment in {"", "Initializing"}

    @property
    def succeeded(self) -> bool:
        """Whether the step did its work. Complete says only that the operator is done: the job may have failed."""
        return self.deployment == "Complete" and self.job == "SUCCEEDED"

    @property
    def kept(self) -> bool:
        """Whether the operator deletes it later, by rules that know this state, so that it can be looked at."""
        return self.deployment == "Failed" or (self.deployment == "Complete" and self.job == "FAILED")

    def describe(self) -> str:
        """`Running / RUNNING`."""
        return " / ".join(word for word in (self.deployment or "created", self.job) if word)

    def explain(self) -> str:
        """Why it ended without success."""
        why = self.reason or self.describe()
        return f"{why}: {' '.join(self.message.split())}" if self.message else why


def state_of(rayjob: dict[str, Any]) -> JobState:
    """The state of a RayJob as the API server returned it."""
    status = rayjob.get("status", {})
    return JobState(
        deployment=status.get("jobDeploymentStatus", ""),
        job=status.get("jobStatus", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        failed=status.get("failed", 0),
    )
