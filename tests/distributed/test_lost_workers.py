"""A cluster that lacks something, does not start, or loses workers, whose failure is one line."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from on_ray import Group, killed_for_memory, ray_driver
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.failure_handling import create_failure_policy
from refused import refused

from ncsn.config import from_yaml
from ncsn.distributed import trainer
from ncsn.distributed.cluster import cluster_for
from ncsn.distributed.ray_train import _Torch, reason
from ncsn.distributed.trainer import LostWorkers, describe
from ncsn.errors import NotFound
from ncsn.model.checkpoint import DamagedError
from ncsn.storage.retry import RETRY


def test_a_cluster_that_does_not_start_is_one_line(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own_words = Exception("The last 20 lines of dashboard.log:\n1\n2")
    monkeypatch.setattr("ray.init", Mock(side_effect=own_words))
    with pytest.raises(RuntimeError) as caught, cluster_for(from_yaml(tiny), start=True):
        pass
    assert len(str(caught.value).splitlines()) == 1 and caught.value.__cause__ is own_words


def test_sigterm_while_ray_starts_is_answered_as_before(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own answer exits."""

    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        signal.raise_signal(signal.SIGTERM)

    def answer(*_: object) -> None:
        sys.exit("ours")

    monkeypatch.setattr("ray.init", init)
    before = signal.signal(signal.SIGTERM, answer)
    try:
        with pytest.raises(SystemExit) as ended, cluster_for(from_yaml(tiny), start=True):
            pass
        assert ended.value.code == "ours" and signal.getsignal(signal.SIGTERM) is answer
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_gpu_that_is_not_there_and_far_more_workers_than_cores_are_refused(tiny: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for settings, start in (("use_gpu: true", False), ("num_workers: 16, cpus_per_worker: 256", True)):
        config = from_yaml(tiny, overrides=[f"compute={{{settings}}}"])
        with refused(f"compute.{settings.partition(':')[0]}"), cluster_for(config, start=start):
            pass


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


@pytest.mark.parametrize("error", [NotFound("/x", "no file here"), DamagedError("/x", "is torn")])
def test_what_another_node_may_have_is_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """What a worker raises is; a mistake is returned."""
    monkeypatch.setattr(trainer, "train_loop", Mock(side_effect=error))
    with pytest.raises(type(error)):
        trainer.attempt(Mock(), "/runs/mine", lambda: SimpleNamespace(device="cpu"))


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
