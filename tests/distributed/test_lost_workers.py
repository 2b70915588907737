"""One line for workers that failed, from what Ray Train hands to its callbacks."""

from __future__ import annotations

import logging
import os
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from on_ray import Group, killed_for_memory, ray_driver
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.failure_handling import create_failure_policy

from ncsn.config import from_yaml
from ncsn.distributed import trainer
from ncsn.distributed.ray_train import _Torch, reason
from ncsn.distributed.trainer import LostWorkers, describe
from ncsn.errors import InvalidValue, NotFound, UserError
from ncsn.storage.retry import RETRY


def died(*, preempted: bool = False) -> Exception:
    """What Ray Train 2.60 reports of a worker that does not answer any more."""
    actor = ActorDiedError()
    actor._preempted = preempted
    error = Exception(f"A worker health check failed.\nWorker info: ...\n{actor}")
    error.health_check_failure = actor  # type: ignore[attr-defined]
    return error


def test_a_lost_worker_is_one_line_until_training_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, file in (("images-000070016", "checkpoint.json"), ("images-000080000", "weights.safetensors")):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / file).touch()
    lost = LostWorkers(str(tmp_path), left=1)

    def said(*errors: Exception) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            lost.count(dict(enumerate(errors)))
        return [record.getMessage() for record in caplog.records]

    errors = {0: RuntimeError("closed by peer\nthen more"), 1: died()}
    (line,) = said(*errors.values())
    assert line.startswith(RETRY) and line.endswith("images-000070016")
    assert said(died(preempted=True)) == [line], "Ray Train counts these apart"
    assert said(died()) == []
    why = reason(WorkerGroupError("[Rank 0 Error Snippet]: ...", errors))
    assert why == describe(errors) and "\n" not in why
    assert "worker 0 " in describe({0: errors[0]}) and "RuntimeError: closed by peer" in describe({0: errors[0]})


@pytest.mark.parametrize(
    ("error", "returned"),
    [
        (InvalidValue("2 is too much"), True),
        (UserError("a.b", "is negative"), True),
        (ValueError("a bug"), False),
        (NotFound("/x", "no file here"), False),
    ],
)
def test_ray_train_repeats_what_a_worker_raises_but_not_a_mistake(monkeypatch, error, returned) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(trainer, "train_loop", fail)
    job = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(keep_checkpoints=1)))
    with nullcontext() if returned else pytest.raises(type(error)):
        assert trainer.attempt(job, "/runs/mine", lambda: SimpleNamespace(device="cpu")) is error


def test_the_processes_of_ray_train_know_their_cluster_among_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert get_env_vars_to_propagate()["RAY_ADDRESS"] == "127.0.0.1:6379"


def test_ray_train_starts_workers_again_that_were_killed_for_memory_at_any_time() -> None:
    error = OutOfMemoryError("1 worker(s) were killed")
    policy = create_failure_policy(FailureConfig(max_failures=0, controller_failure_limit=1))
    assert [policy.make_decision(ControllerError(error)).name for _ in range(2)] == ["RETRY", "RAISE"], "at its start"

    def killed() -> list[object]:
        raise error

    BackendSetupCallback(_Torch()).before_execution_group_shutdown(Group([killed]))
    assert describe({0: RuntimeError("closed by peer"), 1: error}) == describe({1: error}) != describe({1: died()})


@pytest.mark.slow
def test_what_a_node_held_is_said_when_ray_kills_a_worker_for_memory(tiny, monkeypatch) -> None:
    """By Ray's memory monitor, which holds any use of memory for too much here, every eight seconds."""
    for name, value in (("usage_threshold", 0), ("monitor_refresh_ms", 8000)):
        monkeypatch.setenv(f"RAY_memory_{name}", str(value))
    monkeypatch.setenv("RAY_worker_killing_policy_by_group", "1")  # one worker at a time
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "helpers"), prepend=os.pathsep)
    with ray_driver(from_yaml(tiny)) as (driver, _):
        said = driver(killed_for_memory, held=2**28)
    used, limit, shared = map(float, re.findall(r"([\d.]+)GB", said))
    assert limit > used > shared >= 0.25
