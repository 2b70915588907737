"""How a run ended, as `status.json` in its folder: written by the last to know, removed by a step that starts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from ncsn import storage
from ncsn.steps.result import RunFolder

STATUS_FILE = "status.json"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: FINISHED, FAILED or KILLED, as MLflow calls it.
        reason: Why, if it did not finish.
        failed_step: The step that stopped it, if one did.
    """

    status: str
    reason: str = ""
    failed_step: str | None = None

    def __str__(self) -> str:
        return f"{self.failed_step}: {self.reason}" if self.failed_step else self.reason


def write_outcome(folder: RunFolder, outcome: Outcome) -> None:
    """Say how the run ended."""
    record = asdict(outcome) | {"finished_at": datetime.now(UTC).isoformat(timespec="seconds")}
    storage.write_text(storage.join(folder.uri, STATUS_FILE), json.dumps(record, indent=1))


def clear_outcome(folder: RunFolder) -> None:
    """Say that the run is at work."""
    storage.delete_file(storage.join(folder.uri, STATUS_FILE))


def read_outcome(folder: RunFolder) -> Outcome | None:
    """How the run ended; None if it is at work or was never begun."""
    try:
        record = storage.read_json(storage.join(folder.uri, STATUS_FILE))
    except FileNotFoundError:
        return None
    return Outcome(record["status"], record["reason"], record["failed_step"])
