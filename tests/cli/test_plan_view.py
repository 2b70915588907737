"""Durations a person reads, and the account of a run on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ncsn.cli.target import resolve
from ncsn.report.words import duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (119.0, "119 s"), (150.0, "2.5 min"), (7200.0, "2.0 h"), (400_000.0, "4.6 days")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def ncsn(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ncsn", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))


def test_what_a_step_took_is_shown(config_file: Path, store: Path) -> None:
    assert ncsn("ingest", "--config", str(config_file)).returncode == 0
    run = resolve(str(config_file)).run
    shown = ncsn("plan", "--config", str(config_file), "--actual")
    assert shown.returncode == 0, shown.stderr
    assert "ingest" in shown.stdout and "USD" in shown.stdout
    ledger = json.loads(ncsn("plan", "--config", str(config_file), "--actual", "--json").stdout)
    spent = json.loads((store / "runs" / run / "steps" / "ingest" / "spent.json").read_text())["seconds"]
    assert ledger["actual"]["steps"]["ingest"]["seconds"] == spent > 0
    assert ledger["plan"] is None


def test_wrong_prices_are_refused_before_the_rehearsal(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text("gpu_hour: 1")
    refused = ncsn("plan", "--config", str(config_file), "--prices", str(tmp_path / "prices.yaml"))
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert "expected exactly these prices" in line
