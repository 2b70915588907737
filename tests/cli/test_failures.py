"""Every error is one line and an exit code."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from ncsn.answer import Answer
from ncsn.cli.options import ReportingCommand, StepFailed, describe
from ncsn.errors import ConfigError, InvalidValue, Problem, UserError
from ncsn.storage.heartbeat import LeaseExpired


def step_failed(error: Exception) -> StepFailed:
    return StepFailed("train", error, log=Path("/p.log"))


def test_lines_and_code() -> None:
    no_space = "OSError: [Errno 28] No space left on device: '/x'"
    for error, code, lines in (
        (UserError("a.b", "is negative", value=-1), 2, ["a.b = -1: is negative"]),
        (InvalidValue("one\ntwo"), 2, ["one", "two"]),
        (ValueError("a bug"), 1, ["ValueError: a bug"]),
        (RuntimeError("first\nsecond"), 1, ["RuntimeError: first"]),
        (TimeoutError(), 1, ["TimeoutError"]),
        (OSError(28, "No space left"), 1, ["disk full: [Errno 28] No space left"]),
        (OSError(errno.EACCES, "no path"), 1, ["PermissionError: [Errno 13] no path"]),
        (step_failed(OSError(errno.EACCES, "Denied", "/s/db")), 2, ["step train: /s/db: denied"]),
        (step_failed(OSError(errno.EROFS, "Read-only", "/s/db")), 2, ["step train: /s/db: read-only"]),
        (step_failed(RuntimeError("lost")), 1, ["step train: RuntimeError: lost"]),
        (step_failed(InvalidValue("no folder")), 2, ["step train: no folder"]),
        (step_failed(RuntimeError(no_space)), 1, [f"step train: disk full: {no_space}"]),
    ):
        problems, found = describe(error)
        assert ([problem.statement for problem in problems], found) == (lines, code)


def run_failing(error: BaseException, *args: str, **variables: str) -> Result:
    """A command that raises an error."""

    def fail(*, as_json: bool) -> None:
        raise error

    command = ReportingCommand("fail", callback=fail, params=[click.Option(["--json", "as_json"], is_flag=True)])
    return CliRunner(env=variables).invoke(command, args)


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (RuntimeError("broke"), 1, ["error: RuntimeError: broke", "(--traceback or NCSN_TRACEBACK=1 shows where)"]),
        (step_failed(InvalidValue("x")), 2, ["error: step train: x", "(/p.log says more)"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (LeaseExpired("no launcher"), 0, ["no launcher"]),  # else the cluster starts it again
    ],
)
def test_a_command_prints_no_traceback(error: BaseException, code: int, lines: list[str]) -> None:
    result = run_failing(error)
    assert (result.exit_code, result.stderr.splitlines(), result.stdout) == (code, lines, "")


@pytest.mark.parametrize(
    "words", ["", "init", "init x --minutes y", "run x.yaml", "run --confg x", "ls --run", "ls all", "rnu", "--foo"]
)
def test_wrong_words_are_told_in_one_line_and_the_help_in_full(words: str, run_in_process) -> None:
    done = run_in_process(*words.split())
    assert done.exit_code == 2 and done.stdout == ""
    assert [line[:7] for line in done.stderr.splitlines()] == ["error: "] or (not words and "Usage: " in done.stderr)


def test_the_traceback_on_request() -> None:
    bad = InvalidValue("bad value")
    for result in (run_failing(bad, "--traceback"), run_failing(bad, NCSN_TRACEBACK="1")):
        assert result.exit_code == 2 and result.stderr.endswith("error: bad value\n")
        assert "Traceback (most recent call last)" in result.stderr


def test_with_json_the_problems_of_a_mistake_are_on_stdout_too() -> None:
    mistake = ConfigError.of((Problem("a.b", "is negative", value=-1), Problem("c", "unknown key")))
    for error in (mistake, step_failed(mistake)):
        asked = run_failing(error, "--json")
        errors = [line for line in asked.stderr.splitlines() if line.startswith("error: ")]
        assert (asked.exit_code, len(errors), errors[1]) == (2, 2, "error: c: unknown key")
        problems = [problem.to_json() for problem in mistake.problems]
        assert json.loads(asked.stdout) == {"error": {"type": "ConfigError", "problems": problems}}


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("case", ["saves", "a second signal", "too slow", "not begun", "no training"])
def test_the_first_signal_lets_a_training_save_and_has_its_exit_code(tmp_path, monkeypatch, number, case) -> None:
    monkeypatch.setattr("ncsn.answer.SAVE_SECONDS", 0.1 if case == "too slow" else 600.0)
    stop, seen = tmp_path / "stop", list[str]()

    def ask() -> bool:
        if case != "not begun":
            stop.touch()
        return case != "not begun"

    def train() -> None:
        signal.raise_signal(number)
        while not stop.exists():
            time.sleep(0.01)
        seen.append("told")
        if case == "a second signal":
            signal.raise_signal(signal.SIGINT)
        while case == "too slow":
            time.sleep(0.01)
        seen.append("saved")
        raise LeaseExpired

    with (
        installed() as ours,
        pytest.raises((SystemExit, KeyboardInterrupt)),
        nullcontext() if case == "no training" else ours.saving(ask),
    ):
        train()
    assert ours.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert seen == {"saves": ["told", "saved"], "not begun": [], "no training": []}.get(case, ["told"])


def test_a_command_ends_though_the_signal_left_a_lock_taken() -> None:
    """As that of a pool of connections, which urllib3 closes at exit; what else is done there is done."""
    code = """
import atexit, importlib, signal, threading
from ncsn import answer

def wait(prog_name):
    answer.answer.install()
    with answer.answer.waiting(lambda: print("deleted")):
        signal.raise_signal(signal.SIGTERM)

lock = threading.Lock()
lock.acquire()
atexit.register(lock.acquire)
atexit.register(print, "sent", flush=True)
answer.END_SECONDS = 1.0
cli = importlib.import_module("ncsn.cli.app")
cli.app = wait
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (143, b"deleted\nsent\n")


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("kubeflow", ["submit", "--config", "digits"]),
        ("kubeflow", ["cleanup", "--jobs"]),
        ("kubeflow", ["train", "--config", "digits", "--set", "compute.backend=kuberay"]),
        ("search", ["run", "--config", "digits", "--set", "search.num_trials=2"]),
        (None, ["doctor", "--config", "digits"]),
        (None, ["show-config", "--config", "digits"]),
    ],
)
def test_a_command_names_the_extra_that_it_lacks_and_the_others_do_without(extra, arguments, tmp_path: Path) -> None:
    lacking = "import sys; sys.modules.update(dict.fromkeys(['kfp', 'kfp_server_api', 'kubernetes', 'optuna']))"
    command = [sys.executable, "-c", f"{lacking}; from ncsn.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if extra else 0), done.stderr
    assert done.stderr.count("\n") == (1 if extra else 0) and (extra is None or f"ncsn[{extra}]" in done.stderr)
    assert not list(tmp_path.rglob("attempt.json")), "nothing is half-written"
