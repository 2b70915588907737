"""Writes that two processes may make at the same moment."""

from __future__ import annotations

from collections.abc import Callable

_ATTEMPTS = 3


def insert_or_find(write: Callable[[], object]) -> None:
    """Make a write of MLflow that leaves or replaces what is there, also while another process makes the same one.

    MLflow looks first and inserts what it did not find; of two that did not find it, the database refuses the second
    (BAD_REQUEST), which finds it when it tries again.
    """
    from mlflow.exceptions import MlflowException

    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            write()
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST" or not attempts_left:
                raise
        else:
            return
