"""The real command in a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from ncsn.cli.target import resolve
from ncsn.config import from_json


def ncsn(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ncsn", *args],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | (env or {}),
    )


def test_a_step_prints_its_result_and_the_second_call_finds_it(config_file: Path, store: Path) -> None:
    first = ncsn("ingest", "--config", str(config_file), "--json")
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["counts"] == {"train": 64, "test": 64}
    assert Path(result["uri"], "manifest.json").is_file()
    run = resolve(str(config_file)).run
    record = store / "runs" / run / "steps" / "ingest" / "result.json"
    written = record.stat().st_mtime_ns

    second = ncsn("ingest", "--run", run, "--set", f"storage.root={store}")
    assert second.returncode == 0, second.stderr
    assert second.stdout == f"ingest: 64 train + 64 test images, digest {result['digest'][:12]}\nuri: {result['uri']}\n"
    assert record.stat().st_mtime_ns == written


def test_show_config_as_json_is_the_canonical_form(config_file: Path) -> None:
    shown = ncsn("show-config", "--config", str(config_file), "--set", "noise.num_levels=7", "--json")
    assert from_json(shown.stdout) == resolve(str(config_file), overrides=["noise.num_levels=7"]).config


@pytest.mark.parametrize(
    ("args", "subject"),
    [
        (["--set", "noise.num_level=5"], "noise.num_level: "),
        (["--set", "noise.sigma_1=0.001"], "noise.sigma_1 = 0.001: "),
        (["--set", "compute.num_workers=17"], "train.batch_size = 16: "),
        (["--set", "nonsense"], "--set 'nonsense': "),
        (["--run", "Not Valid"], "--run 'Not Valid': "),
        (["--set", "data.source=fashion_mnist", "--set", "data.root=/no/such/folder"], "/no/such/folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(config_file: Path, store: Path, args: list[str], subject: str) -> None:
    done = ncsn("ingest", "--config", str(config_file), *args)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert len(errors) == 1
    assert subject in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (store / "datasets").exists()


def test_a_run_name_belongs_to_one_experiment(config_file: Path) -> None:
    assert ncsn("ingest", "--config", str(config_file), "--run", "mine").returncode == 0
    other = ncsn("run", "--config", str(config_file), "--run", "mine", "--set", "seed=5")
    assert other.returncode == 2
    assert "error: --run 'mine': " in other.stderr
    assert "seed" in other.stderr


def test_one_run_is_not_trained_twice_at_once(config_file: Path, store: Path) -> None:
    folder = store / "runs" / "mine"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        done = ncsn("run", "--config", str(config_file), "--run", "mine")
    assert done.returncode == 2
    assert "error: --run 'mine': " in done.stderr


def test_a_remote_store_without_a_tracking_server_is_refused_at_once(config_file: Path) -> None:
    done = ncsn("run", "--config", str(config_file), "--set", "storage.root=s3://bucket/prefix")
    assert done.returncode == 2
    assert "error: tracking.uri: " in done.stderr


def test_a_fault_that_there_is_not_is_one_line_and_claims_no_run(config_file: Path, store: Path) -> None:
    done = ncsn("train", "--config", str(config_file), "--run", "mine", "--dataset", "x", "--inject", "kill@images=3")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --inject 'kill@images=3': ")
    assert not (store / "runs" / "mine" / "config.yaml").exists()
    done = ncsn("sample", "--model", "models:/m/1", "--inject", "store-down@images=3:1s")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--inject" in done.stderr
