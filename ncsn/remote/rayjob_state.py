"""The status of a RayJob, and what it means for the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_TERMINAL = {"Complete", "Failed", "ValidationFailed"}  # KubeRay's own helper lacks the last, and would wait forever


@dataclass(frozen=True)
class JobState:
    """The status of a RayJob."""

    deployment: str  # jobDeploymentStatus: what the operator does
    job: str  # jobStatus: what the Ray job does
    reason: str
    message: str
    failed: int  # attempts

    @property
    def finished(self) -> bool:
        """Whether the status is final."""
        return self.deployment in _TERMINAL

    @property
    def ended_by_operator(self) -> bool:
        """Whether a limit of the operator ended it, and not its driver."""
        return self.reason.endswith("Exceeded") or self.deployment == "ValidationFailed"

    @property
    def starting(self) -> bool:
        """Whether its cluster starts."""
        return self.deployment in {"", "Initializing"}

    @property
    def succeeded(self) -> bool:
        """Whether the step did its work; of a failed job, Complete says only that the operator is done."""
        return self.deployment == "Complete" and self.job == "SUCCEEDED"

    @property
    def kept(self) -> bool:
        """Whether it stays for inspection, because the operator has rules to delete it later."""
        return self.deployment == "Failed" or (self.deployment == "Complete" and self.job == "FAILED")

    def describe(self) -> str:
        """`Running / RUNNING`."""
        return " / ".join(word for word in (self.deployment or "created", self.job) if word)

    def explain(self) -> str:
        """Why it failed."""
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
