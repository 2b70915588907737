"""Every error is one line and an exit code."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ncsn.answer import Answer
from ncsn.cli import app
from ncsn.cli.options import ReportingCommand, StepFailed, describe
from ncsn.errors import ConfigError, InvalidValue, NotFound, Problem, UserError
from ncsn.storage.heartbeat import LeaseExpired

SHOWS_WHERE = "(--traceback or NCSN_TRACEBACK=1 shows where)"


def step_failed(error: Exception) -> StepFailed:
    return StepFailed("train", error, log=Path("/p.log"))


NO_SPACE = "OSError: [Errno 28] No space left on device: '/x'"


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UserError("a.b", "is negative", value=-1), 2, ("a.b = -1: is negative",)),
        (NotFound("/x", "no file here"), 2, ("/x: no file here",)),
        (InvalidValue("bad value"), 2, ("bad value",)),
        (InvalidValue("one\ntwo"), 2, ("one", "two")),
        (ValueError("a bug"), 1, ("ValueError: a bug",)),
        (RuntimeError("first\nsecond"), 1, ("RuntimeError: first",)),
        (TimeoutError(), 1, ("TimeoutError",)),
        (OSError(28, "No space left"), 1, ("disk full: [Errno 28] No space left",)),
        (step_failed(RuntimeError("lost")), 1, ("step train: RuntimeError: lost",)),
        (step_failed(InvalidValue("no folder")), 2, ("step train: no folder",)),
        (step_failed(RuntimeError(NO_SPACE)), 1, (f"step train: disk full: {NO_SPACE}",)),
    ],
)
def test_lines_and_code(error: Exception, code: int, lines: tuple[str, ...]) -> None:
    problems, found = describe(error)
    assert (found, tuple(map(str, problems))) == (code, lines)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_file_that_may_not_be_written_is_a_mistake_with_its_path(number: int) -> None:
    (problem,), code = describe(step_failed(OSError(number, os.strerror(number), "/s/mlflow.db")))
    assert (problem.key, problem.reason, code) == ("/s/mlflow.db", os.strerror(number).lower(), 2)
    assert describe(OSError(number, "no path"))[1] == 1


def command_that_raises(error: BaseException) -> click.Command:
    def fail(*, as_json: bool) -> None:
        raise error

    return ReportingCommand("fail", callback=fail, params=[click.Option(["--json", "as_json"], is_flag=True)])


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (RuntimeError("broke"), 1, ["error: RuntimeError: broke", SHOWS_WHERE]),
        (step_failed(InvalidValue("x")), 2, ["error: step train: x", "(/p.log says more)"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
)
def test_a_command_prints_no_traceback(error: BaseException, code: int, lines: list[str]) -> None:
    result = CliRunner().invoke(command_that_raises(error))
    assert (result.exit_code, result.stderr.splitlines(), result.stdout) == (code, lines, "")


@pytest.mark.parametrize("wrapped", [False, True], ids=["here", "in a step"])
def test_with_json_the_problems_of_a_mistake_are_on_stdout_too(*, wrapped: bool) -> None:
    mistake = ConfigError.of((Problem("a.b", "is negative", value=-1), Problem("c", "unknown key")))
    asked = CliRunner().invoke(command_that_raises(step_failed(mistake) if wrapped else mistake), ["--json"])
    errors = [line for line in asked.stderr.splitlines() if line.startswith("error: ")]
    assert (asked.exit_code, len(errors), errors[1]) == (2, 2, "error: c: unknown key")
    problems = [problem.to_json() for problem in mistake.problems]
    assert json.loads(asked.stdout) == {"error": {"type": "ConfigError", "problems": problems}}


@pytest.mark.parametrize(("args", "env"), [(["--traceback"], {}), ([], {"NCSN_TRACEBACK": "1"})])
def test_the_traceback_on_request(args: list[str], env: dict[str, str]) -> None:
    result = CliRunner().invoke(command_that_raises(InvalidValue("bad value")), args, env=env)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: bad value\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("operands could not be broadcast"), 1, "error: ValueError: operands could not be broadcast"),
        (InvalidValue("2 is too much"), 2, "error: 2 is too much"),
        (UserError("data.root", "is empty", value="/x"), 2, "error: data.root = '/x': is empty"),
    ],
    ids=["bug", "value", "mistake"],
)
def test_of_what_a_step_raises_only_mistakes_are_the_users(
    config_file: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: ValueError,
    code: int,
    line: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ncsn.steps.ingest.ingest", fail)
    with pytest.raises(SystemExit) as ended:
        app(["ingest", "--config", str(config_file), "--run", "mine", "--json"])
    printed = capfd.readouterr()
    assert ended.value.code == code and line in printed.err.splitlines()
    record = json.loads((store / "runs/mine/steps/ingest/step.json").read_text())["error"]
    assert (record["kind"], bool(record["problems"])) == (type(error).__name__, code == 2)
    assert ("error" in json.loads(printed.out or "{}")) == (code == 2)


@contextmanager
def installed() -> Iterator[Answer]:
    """An answer to signals during the block, as a command has it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = Answer()
    ours.install()
    try:
        yield ours
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("code", [0, 1])
def test_sigterm_and_ctrl_c_have_their_exit_codes_whatever_ray_makes_of_them(code: int) -> None:
    """A wait for Ray makes 1 of any exit code."""
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with installed() as ours, suppress(SystemExit, KeyboardInterrupt):
            try:
                signal.raise_signal(number)
            finally:
                sys.exit(code)
        assert ours.code == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("case", ["saves", "a second signal", "too slow", "not begun"])
def test_the_first_signal_lets_a_training_save(tmp_path, monkeypatch, number, case) -> None:
    monkeypatch.setattr("ncsn.answer.SAVE_SECONDS", 0.1 if case == "too slow" else 600.0)
    stop = tmp_path / "stop"

    def ask() -> bool:
        if case != "not begun":
            stop.touch()
        return case != "not begun"

    seen = list[str]()

    def train() -> None:
        signal.raise_signal(number)
        while not stop.exists():
            time.sleep(0.01)
        seen.append("told")
        if case == "a second signal":
            signal.raise_signal(signal.SIGINT)
        elif case == "too slow":
            while True:
                time.sleep(0.01)
        seen.append("saved")
        raise LeaseExpired

    with installed() as ours, pytest.raises((SystemExit, KeyboardInterrupt)), ours.saving(ask):
        train()
    assert ours.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert seen == {"saves": ["told", "saved"], "not begun": []}.get(case, ["told"])
