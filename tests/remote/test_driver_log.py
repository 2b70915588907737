"""The cause of a failure, found in the log of its driver."""

from __future__ import annotations

import pytest

from ncsn.remote.backend import first_error

TRACEBACK = "Traceback (most recent call last):"
WORKER = "\x1b[36m(RayTrainWorker pid=7, ip=10.0.0.2)\x1b[0m"


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["fine", "images_seen 320"], None),
        ([TRACEBACK, '  File "x.py", line 1', "ValueError: no such data"], "ValueError: no such data"),
        (
            [
                f"(TrainController pid=3) {TRACEBACK}",
                "(TrainController pid=3) ray.exceptions.GetTimeoutError: Get timed out",
                f"{WORKER} {TRACEBACK}",
                f"{WORKER} torch.OutOfMemoryError: CUDA out of memory",
                TRACEBACK,
                "RuntimeError: a worker died",
            ],
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        (["error: first", "error: disk full: no space left to write x"], "disk full: no space left to write x"),
        (["ValueError: not in a traceback"], None),
    ],
    ids=["success", "traceback", "worker", "ncsn's own", "no traceback"],
)
def test_the_first_traceback_is_the_cause_else_what_ncsn_said(lines: list[str], cause: str | None) -> None:
    assert first_error(lines) == cause
