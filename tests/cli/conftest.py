"""A small experiment, and the command in this process or in a new one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ncsn.cli import app

TINY = """
name: tiny
data: {{source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3, max_images: 64}}
noise: {{num_levels: 4}}
network: {{kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}}
train: {{batch_size: 16, num_images: 160, checkpoint_every_images: 80, report_every_images: 80}}
sampling: {{num_images: 8, sampler: {{kind: annealed_langevin, steps_per_level: 2}}}}
evaluation: {{num_splits: 2}}
storage: {{root: {root}}}
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def config_file(tmp_path: Path, store: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(root=store))
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
