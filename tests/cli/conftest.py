"""A small experiment, and the command in this process or in a new one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from experiments import TINY

from ncsn.cli import app


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def config_file(tmp_path: Path, store: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{TINY}storage: {{root: {store}}}\n")
    return path


@pytest.fixture
def run_in_process() -> Callable[..., Result]:
    """`ncsn ARGUMENTS` in this process."""
    return lambda *arguments, **variables: CliRunner(env=variables).invoke(app, [*arguments])


@pytest.fixture
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`ncsn ARGUMENTS` in another process."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ncsn", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)

    return run


@pytest.fixture
def require_mistake() -> Callable[..., None]:
    """Exit code 2, nothing on stdout and one line `error: SUBJECT: ...`."""

    def require(done: Result | subprocess.CompletedProcess[str], subject: str) -> None:
        code = done.exit_code if isinstance(done, Result) else done.returncode
        assert code == 2, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: {subject}: ")
        assert "Traceback" not in done.stderr
        assert done.stdout == ""

    return require
