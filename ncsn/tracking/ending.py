"""The last words of a step: told to the server, or kept for the next command of the run if it is away."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ncsn.tracking.delivery import HOPELESS, patience, tell
from ncsn.tracking.journal import Entry, held, now

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

RETRIES, TIMEOUT = 2, 10
"""Tries, and seconds for each, before the rest is left to the next command."""

Message = tuple[str, Entry]
"""Id of an MLflow run, and what to record there."""

_logger = logging.getLogger(__name__)


def endings(run_ids: Sequence[str], status: str) -> list[Message]:
    """That these runs have ended now."""
    ended = now()
    return [(run_id, Entry("status", ended, ended, status=status)) for run_id in run_ids]


def conclude(client: MlflowClient, journals: str, messages: Sequence[Message]) -> None:
    """Record messages; once the server turns out to be away, the rest waits in `journals`: the work itself is done."""
    from mlflow.exceptions import MlflowException

    away = False
    for run_id, entry in messages:
        if not away:
            try:
                with patience(retries=RETRIES, timeout=TIMEOUT):
                    tell(client, run_id, entry)
                continue
            except MlflowException as error:
                away = error.error_code not in HOPELESS
        _keep(journals, run_id, entry)


def _keep(journals: str, run_id: str, entry: Entry) -> None:
    try:
        with held(journals, run_id, patience=TIMEOUT) as journal:
            journal.append(entry)
    except OSError as error:
        _logger.warning("the MLflow run %s is not complete: %s", run_id, error)
