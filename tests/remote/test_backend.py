"""What all backends share: whose a job is, what it takes along, what it is called, and why it failed."""

from __future__ import annotations

import re
import signal
import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from ncsn.remote import backend
from ncsn.remote.backend import DriverLog, RemoteStep, first_error, forwarded_environment, is_ours
from ncsn.runs.layout import RUN_PATTERN


@pytest.mark.parametrize(
    ("address", "to_pods", "to_jobs"),
    [
        ("http://mlflow.ncsn-system:5000", True, True),
        ("https://localhost.example.com", True, True),
        ("http://localhost:5000", False, True),
        ("http://[::1]:5000", False, True),
        ("http://user:word@mlflow", False, False),
    ],
)
def test_a_port_forward_and_a_password_are_not_handed_on(monkeypatch, address, to_pods, to_jobs) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("OF_THE_LAUNCHER", "1")
    assert (forwarded_environment(to_pods=True) == {"MLFLOW_TRACKING_URI": address}) == to_pods
    assert (forwarded_environment() == {"MLFLOW_TRACKING_URI": address}) == to_jobs


@pytest.mark.parametrize(
    ("alone", "kfp_run", "this_run", "ours"),
    [
        (False, None, None, False),  # also of its maker
        (True, None, None, True),  # also if whoever made it is gone
        (True, "a", "b", False),
        (False, "a", "a", True),  # another task of the same pipeline run
        (True, "a", None, False),
        (True, None, "a", False),
    ],
)
def test_a_job_is_its_pipeline_runs_else_the_last_launchers(alone, kfp_run, this_run, ours) -> None:
    heart: Any = SimpleNamespace(alone=alone)
    assert is_ours(heart, kfp_run, this_run) == ours


@given(run=st.from_regex(RUN_PATTERN, fullmatch=True), kind=st.sampled_from(["train", "evaluate"]))
def test_names_are_valid_and_the_same_for_every_attempt(run: str, kind: str) -> None:
    name = RemoteStep("s3://bucket/ncsn", run, kind, ("ncsn", "train")).job_name
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 47
    assert name == RemoteStep("s3://bucket/ncsn", run, kind, ("another",)).job_name
    assert name != RemoteStep("s3://another/ncsn", run, kind, ("ncsn", "train")).job_name
    assert f"-{kind}-" in name


TRACEBACK = "Traceback (most recent call last):"
WORKER = "\x1b[36m(RayTrainWorker pid=7, ip=10.0.0.2)\x1b[0m"


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
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
    ids=["traceback", "worker", "ncsn's own", "no traceback"],
)
def test_the_first_traceback_is_the_cause_else_what_ncsn_said(lines: list[str], cause: str | None) -> None:
    assert first_error(lines) == cause


def test_a_signal_at_any_moment_leaves_a_log_that_can_be_left(monkeypatch) -> None:
    """As when SIGTERM comes while the launcher asks for the log of a RayJob whose status has changed."""

    class Silent(DriverLog):
        def read(self, *, over: bool) -> list[str]:
            return []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "_LOG_SECONDS", 0.01)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for tick in range(500):
            log = Silent("")
            log.__enter__()
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + 1e-7 * tick)
                while True:
                    log.due.put(None)
            leave = threading.Thread(target=log.__exit__, args=(KeyboardInterrupt,), daemon=True)
            leave.start()
            leave.join(60)
            assert not leave.is_alive()
    finally:
        signal.signal(signal.SIGALRM, before)
