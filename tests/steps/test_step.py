"""Run names are claimed once, and a step does its work once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from do import Doing, claimed, do, recorded
from refused import refused

from ncsn import storage
from ncsn.config import Config, from_yaml
from ncsn.environment import KFP_RUN_ID
from ncsn.errors import InvalidValue, NotFound, Problem, UserError
from ncsn.remote.backend import EndedByOther, RemoteLost, RemoteStep
from ncsn.runs.layout import run_folder
from ncsn.runs.record import Attempt, ForeignRun, StepError, read_attempt, read_finished, record_failure, state_after
from ncsn.runs.results import Result
from ncsn.runs.run import Run
from ncsn.runs.steps import STEP_TABLE
from ncsn.steps import elsewhere
from ncsn.steps.execute import require_possible
from ncsn.steps.prepared import Context
from ncsn.storage.heartbeat import LEASE_SECONDS, LeaseExpired
from ncsn.tracking import mlflow_runs

DIGITS = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()


@dataclass(frozen=True)
class Made(Result):
    step = "train"

    uri: str
    number: int


@dataclass(frozen=True)
class MadeOfSample(Made):
    step = "sample"


def made_by(patch: pytest.MonkeyPatch) -> None:
    """Steps result in what these tests make."""
    for kind in (Made, MadeOfSample):
        patch.setitem(STEP_TABLE, kind.step, replace(STEP_TABLE[kind.step], result=kind))


@pytest.fixture(autouse=True)
def _untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_runs, "step_run", lambda *_, **__: nullcontext())


def config_at(root: Path, *overrides: str) -> Config:
    return from_yaml(DIGITS, overrides=[f"storage.root={root}", *overrides])


def work(config, run, do_it: Callable[[Context], object], *, inputs=(), name="train", **given) -> Any:
    """A step whose work is `do_it`."""
    with pytest.MonkeyPatch.context() as patch:
        prepared = Doing(config, dict(inputs), do_it)
        patch.setattr(f"ncsn.steps.{name}.prepare", lambda *_, **__: prepared)
        made_by(patch)
        patch.setattr("ncsn.steps.execute.find_inputs", lambda *_, **__: {})
        return do(name, config, run, **given)


def make(config, run, *, inputs, number=1, name="train", **given) -> Made:
    def make_it(context: Context) -> Made:
        target = storage.join(context.folder.uri, "made.txt")
        context.progress.start(1, "files")
        context.progress.advance()
        storage.write_text(target, str(number))
        return (Made if name == "train" else MadeOfSample)(uri=target, number=number)

    return work(config, run, make_it, inputs=inputs, name=name, **given)


def fail_with(error: BaseException) -> Callable[[Context], object]:
    def fail(_: Context) -> None:
        raise error

    return fail


def test_a_name_belongs_to_its_config_and_so_do_the_records(tmp_path: Path) -> None:
    for name in ("", "../x", "A", "a/", "x" * 64):
        with refused("--run"):
            run_folder(config_at(tmp_path), name)
    with pytest.raises(RuntimeError):
        work(config_at(tmp_path), "first", fail_with(RuntimeError("of the first")))
    claimed(config_at(tmp_path, "compute.num_workers=1", "sampling.seed=4"), "first")
    with refused("--run", error=ForeignRun) as caught:
        work(config_at(tmp_path, "seed=7"), "first", fail_with(RuntimeError("of another")))
    assert caught.value.problems[0].value == "first" and "seed" in caught.value.problems[0].reason
    assert read_attempt(run_folder(config_at(tmp_path), "first"), "train").error.message == "of the first"


def test_work_is_done_once_for_the_same_inputs_and_again_for_a_lost_output_but_no_training(tmp_path: Path) -> None:
    config = config_at(tmp_path)
    made = [make(config, "mine", inputs={"a": value}, number=number) for number, value in enumerate((1, 1, 2))]
    assert [each.number for each in made] == [0, 0, 2]
    make(config, "mine", inputs={}, name="sample")
    Path(made[0].uri).unlink()
    assert make(config, "mine", inputs={}, number=3, name="sample").number == 3
    Path(made[0].uri).unlink()
    for _ in range(2):  # the failure changes nothing
        with refused(made[0].uri, error=NotFound):
            make(config, "mine", inputs={"a": 2}, number=4)
    storage.delete(run_folder(config, "mine").step("train", "result.json"))
    assert make(config, "mine", inputs={"a": 2}, number=4).number == 4


def elsewhere_by(monkeypatch: pytest.MonkeyPatch, execute: Callable[..., object]) -> None:
    """A backend waits for the job of a step like this."""
    backend = SimpleNamespace(connect=lambda: None, execute=execute)
    monkeypatch.setattr(elsewhere, "open_backend", lambda _compute: backend)


def test_a_lost_step_counts_only_with_a_result_and_one_that_another_ended_starts_again(tmp_path, monkeypatch) -> None:
    """It may have ended well before it was lost, and been the job of another pipeline run."""
    config, here = config_at(tmp_path, "compute.backend=ray-jobs"), config_at(tmp_path)
    folder, uri = run_folder(config, "mine"), make(here, "mine", inputs={"a": 1}).uri
    there = list[Callable[[], object]]()

    def execute(_: RemoteStep, accepted: Callable[[], None]) -> None:
        accepted()
        assert read_attempt(folder, "train").error is None
        if there:
            there.pop(0)()
        raise RemoteLost("its head was restarted")

    def ended() -> None:
        recorded(folder, "train", state="KILLED", error=StepError("SystemExit", "143"))
        raise EndedByOther("its RayJob was deleted")

    elsewhere_by(monkeypatch, execute)
    with pytest.raises(RemoteLost):  # there is a result of other inputs
        make(config, "mine", inputs={"a": 2})
    there += [ended, lambda: make(here, "mine", inputs={"a": 2}, number=2)]
    assert make(config, "mine", inputs={"a": 2}, number=3) == Made(uri, 2)
    assert there == []


def test_a_result_that_comes_while_a_second_launcher_attaches_is_its_own(tmp_path, monkeypatch) -> None:
    """Launchers without torch, which do not know what the inputs of the result are."""
    config = config_at(tmp_path, "compute.backend=ray-jobs")
    folder, asked, request = run_folder(config, "shared"), {"dataset": "a"}, list[str]()

    def launched(work: Callable[[], object]) -> str:
        elsewhere_by(monkeypatch, lambda step, accepted: (request.append(step.request), accepted(), work()))
        monkeypatch.setattr("ncsn.steps.execute.find_spec", lambda _: None)
        made_by(monkeypatch)
        return str(do("train", config, "shared", **asked).uri)

    def while_it_works() -> None:
        monkeypatch.undo()
        monkeypatch.setattr(mlflow_runs, "step_run", lambda *_, **__: nullcontext())
        make(config_at(tmp_path), "shared", inputs={"a": 1}, lease=f"{tmp_path}/lease/{request[0]}")
        # The first has not seen the end yet; the second attaches to a job that has just ended, or takes the result.
        assert launched(lambda: None) == uri

    uri = storage.join(folder.uri, "made.txt")
    assert launched(while_it_works) == uri
    assert launched(lambda: pytest.fail("it is done")) == uri
    asked["dataset"] = "b"
    with pytest.raises(RuntimeError):  # what is stored is another request's
        launched(lambda: None)


def test_a_result_that_is_there_or_comes_meanwhile_is_not_that_of_a_job_for_other_inputs(tmp_path: Path) -> None:
    config, job = config_at(tmp_path), {"state": "RUNNING", "request": "5f3a"}
    folder, made = run_folder(config, "mine"), make(config, "mine", inputs={"a": 1}, name="sample")
    recorded(folder, "sample", **job)
    assert make(config, "mine", inputs={"a": 1}, number=2, name="sample") == made
    assert read_attempt(folder, "sample").state == "RUNNING"

    def while_it_begins(_: Context) -> Made:
        recorded(folder, "sample", **job)
        return MadeOfSample(made.uri, 3)

    assert work(config, "mine", while_it_begins, inputs={"a": 3}, name="sample").number == 3
    record = read_attempt(folder, "sample")
    assert (record.state, record.request) == ("FINISHED", "")
    assert read_finished(folder, "sample").key == {"a": 3}


def test_an_attempt_that_begins_nothing_is_recorded_unless_a_job_goes_on(tmp_path: Path, monkeypatch) -> None:
    config = config_at(tmp_path)
    folder = claimed(config, "mine")
    (lease := Path(folder.step("sample", "lease/5f3a/launcher"))).parent.mkdir(parents=True)
    lease.touch()
    monkeypatch.setattr("ncsn.steps.execute.find_inputs", lambda *_, **__: {})
    monkeypatch.setattr("ncsn.steps.sample.prepare", lambda *_: 1 / 0)
    for request, renewed, state in (("", True, "FAILED"), ("5f3a", True, "RUNNING"), ("5f3a", False, "FAILED")):
        recorded(folder, "sample", state="RUNNING", error=None, request=request)
        if not renewed:
            os.utime(lease, (0, 0))
        with pytest.raises(ZeroDivisionError):
            do("sample", config, "mine")
        record = read_attempt(folder, "sample")
        assert (record.state, record.error is None) == (state, state == "RUNNING")


@pytest.mark.parametrize(
    ("error", "problems"),
    [
        (UserError("a.b", "small", hint="raise it", value=1), [Problem("a.b", "small", "raise it", value=1)]),
        (InvalidValue("too small"), [Problem("", "too small")]),
        (ValueError("a bug"), []),
        (SystemExit("terminated"), []),
    ],
)
def test_whatever_ends_a_step_is_recorded_until_it_starts_again(tmp_path, monkeypatch, error, problems) -> None:
    monkeypatch.setenv(KFP_RUN_ID, "5f3a")
    config = config_at(tmp_path)
    folder = run_folder(config, "fails")
    with pytest.raises(type(error)):
        work(config, "fails", fail_with(error))
    record = read_attempt(folder, "train")
    assert record.state == ("FAILED" if isinstance(error, Exception) else "KILLED")
    assert read_finished(folder, "train") is None
    assert record.error == StepError(type(error).__name__, str(error), tuple(problems), "5f3a")

    def start(_: Context) -> None:
        begun = read_attempt(folder, "train")
        assert (begun.state, begun.error) == ("RUNNING", None)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work(config, "fails", start)


def test_a_driver_whose_launchers_are_gone_starts_nothing(tmp_path: Path) -> None:
    lease = tmp_path / "lease"
    lease.mkdir()
    (lease / "first").touch()
    os.utime(lease / "first", (time.time() - 1.1 * LEASE_SECONDS,) * 2)
    with pytest.raises(LeaseExpired):
        do("ingest", config_at(tmp_path), "left", lease=str(lease))
    assert read_attempt(run_folder(config_at(tmp_path), "left"), "ingest").state == "KILLED"


@pytest.mark.parametrize(
    ("driver", "launcher", "kept"),
    [
        (RuntimeError("worker lost"), RuntimeError("RayJob x failed: worker lost; a pod was OOMKilled"), "launcher"),
        (RuntimeError("worker lost"), RuntimeError("RayJob x was deleted"), "driver"),
        (SystemExit(143), RuntimeError("RayJob x failed: DeadlineExceeded"), "launcher"),
        (ValueError("the cause"), SystemExit(143), "driver"),
    ],
)
def test_a_reason_is_replaced_only_by_a_stronger_one(tmp_path, driver, launcher, kept) -> None:
    """What the driver wrote stays when its launcher is stopped after it."""
    config = config_at(tmp_path)
    folder = claimed(config, "told")
    for error in (driver, launcher):
        record_failure(folder, "train", error, before=Attempt(), request="")
    record, expected = read_attempt(folder, "train"), {"driver": driver, "launcher": launcher}[kept]
    assert record.error is not None and record.error.message == str(expected)
    assert record.state == state_after(expected)
    make(config, "told", inputs={})
    record_failure(folder, "train", launcher, before=record, request="")
    record = read_attempt(folder, "train")
    assert (record.state, record.error) == ("FINISHED", None)


def test_a_stopped_attempt_with_other_inputs_keeps_the_result(tmp_path: Path) -> None:
    config = config_at(tmp_path)
    made = make(config, "kept", inputs={"a": 1})

    def stop(_: Context) -> None:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        work(config, "kept", stop, inputs={"a": 2})
    assert read_attempt(run_folder(config, "kept"), "train").state == "KILLED"
    assert make(config, "kept", inputs={"a": 1}, number=2) == made


def test_to_refuse_changes_nothing(tmp_path: Path) -> None:
    """Neither in a store that does not exist yet nor in one whose run has read other images and is shorter."""
    experiment = config_at(tmp_path / "store", "data.max_images=16")
    for step in STEP_TABLE.values():
        if step.name != "search":  # it has no search
            require_possible(step.name, Run(experiment, "mine"))
    assert not list(tmp_path.iterdir())
    make(experiment, "mine", inputs={})
    recorded(
        run_folder(experiment, "mine"), "ingest", state="FINISHED", result={"digest": "0"}, key={"files": "others"}
    )
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    for override in ("data.max_images=20", "train.num_images=500000", "train.init_from=mine"):
        run = Run(config_at(tmp_path / "store", override), "mine")
        for step in ("ingest", "train", "sample", "evaluate"):
            require_possible(step, run)
        assert not run.claimed
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
