"""The real command: what it prints, refuses and leaves behind."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
from do import recorded
from filelock import FileLock
from ports import free_port

from ncsn.cli.registry import require_free
from ncsn.cli.run import run_select
from ncsn.cli.target import TargetOptions
from ncsn.config import from_yaml
from ncsn.runs.run import Run


def test_a_step_prints_its_result_and_the_second_call_finds_it(run_command, config_file: Path, store: Path) -> None:
    first = run_command("ingest", "--config", str(config_file), "--json")
    assert first.returncode == 0, first.stderr
    result, run = json.loads(first.stdout), TargetOptions(str(config_file)).resolve().name
    assert result["counts"] == {"train": 1258, "test": 539}
    assert Path(result["uri"], "manifest.json").is_file()
    record = store / "runs" / run / "steps" / "ingest" / "result.json"
    written = record.stat().st_mtime_ns
    second = run_command("ingest", "--run", run, "--set", f"storage.root={store}")
    assert second.returncode == 0, second.stderr
    said = f"ingest: 1,258 train + 539 test images, digest {result['digest'][:12]}"
    assert second.stdout == f"{said}\nuri: {result['uri']}\n"
    assert record.stat().st_mtime_ns == written


def test_show_config_as_json_is_the_canonical_form_of_what_is_planned(run_in_process, config_file: Path) -> None:
    options = ("--config", str(config_file), "--set", "noise.num_levels=7")
    shown = run_in_process("show-config", *options, "--json")
    assert from_yaml(shown.stdout) == TargetOptions(str(config_file), ("noise.num_levels=7",)).resolve().config
    planned = run_in_process("plan", *options)
    assert planned.exit_code == 0, planned.output
    for part in ("train ", "sample ", "CPU hours", " parameters", "training images/s", "NFE 8"):
        assert part in planned.stdout


def test_a_mistake_is_one_line_and_leaves_nothing(
    run_in_process, require_mistake, config_file, store: Path, monkeypatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    file = str(config_file)
    for (name, *options), subject in (
        (["ingest", "--set", "noise.num_level=5"], "--set: noise.num_level"),
        (["ingest", "--set", "nonsense"], "--set 'nonsense'"),
        (["ingest", "--run", "Not Valid"], "--run 'Not Valid'"),
        (["run", "--set", "storage.root=s3://bucket/prefix"], "tracking.uri"),
        (["run", "--set", "compute={use_gpu: true, num_workers: 2}"], "compute.num_workers = 2"),
        (["run", "--set", "compute={cpus_per_worker: 1024, num_workers: 16}"], "compute.num_workers = 16"),
        (["run", "--backend", "kuberay", "--address", "http://head:8265"], "--address 'http://head:8265'"),
        (["select"], "--dataset"),
        *((["sample", "--png", place], f"--png '{place}'") for place in (file, f"{file}/y", "/proc/y")),
        (["sample", "--set", "sampling.num_images=1"], "--checkpoint"),
        (["run", "--set", "sampling.num_images=1"], "sampling.num_images = 1"),
        (["search"], "search"),
        (["plan", "--set", "noise=auto"], "noise = 'auto'"),
    ):
        require_mistake(run_in_process(name, "--config", file, *options), subject)
    assert not store.exists()


def test_an_option_asks_for_the_dashboard_of_a_cluster(run_in_process, monkeypatch) -> None:
    monkeypatch.setenv("NCSN_DASHBOARD", "")
    for command in ("run", "train"):
        run_in_process(command, "--config", "nowhere.yaml")
        assert not os.environ["NCSN_DASHBOARD"]
    run_in_process("train", "--config", "nowhere.yaml", "--dashboard")
    assert os.environ["NCSN_DASHBOARD"] == "1"


def test_pages_on_a_busy_port_are_refused(run_in_process, require_mistake, config_file, monkeypatch) -> None:
    monkeypatch.setattr("subprocess.Popen", None)  # no server is started
    args = ["ui", "--config", str(config_file), "--set", "tracking.uri=postgresql://server/runs"]
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        require_mistake(run_in_process(*args, "--port", port), f"--port {port}")
    require_mistake(run_in_process(*args, "--host", "192.0.2.1"), "--host '192.0.2.1'")


def test_pages_open_in_a_browser_and_end_with_the_command(config_file: Path, tmp_path: Path, monkeypatch) -> None:
    opened, browser, port, (seen, terminal) = tmp_path / "opened", tmp_path / "xdg-open", free_port(), pty.openpty()
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/new && mv {tmp_path}/new {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("DISPLAY", ":0")
    command = [sys.executable, "-m", "ncsn", "ui", "--config", str(config_file), "--port", str(port)]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal) as process:
        while not opened.exists() and process.poll() is None:
            time.sleep(0.1)
        urlopen(f"http://127.0.0.1:{port}/health").close()
        process.terminate()
    said = os.read(seen, 10_000)
    assert said.count(b"http://127.0.0.1") == 1 and b"GET" not in said and b"Warning" not in said
    assert opened.read_text() == f"http://127.0.0.1:{port}/#/experiments\n"
    require_free("127.0.0.1", port)


def test_one_run_is_not_trained_twice_at_once(run_command, require_mistake, config_file: Path, store: Path) -> None:
    (store / "runs" / "mine").mkdir(parents=True)
    with FileLock(store / "runs" / "mine" / ".lock"):
        require_mistake(run_command("run", "--config", str(config_file), "--run", "mine"), "--run 'mine'")


@pytest.mark.parametrize("kept", [["/c/1"], []])
def test_a_select_that_was_stopped_goes_on_with_what_it_chose(config_file, monkeypatch, kept) -> None:
    recorded((run := Run(from_yaml(config_file.read_text()), "mine")).folder, "sample", result={"checkpoint": "/c/1"})
    done = list[str]()

    def run_step(step: str, *_: object, **__: object) -> SimpleNamespace:
        done.append(step)
        return SimpleNamespace(step=step, kept=kept, checkpoint="/c/1")

    monkeypatch.setattr("ncsn.cli.run.run_step", run_step)
    monkeypatch.setattr("ncsn.cli.run.describe_result", lambda *_: "")
    run_select(run, code_here=False, given={}, as_json=False)
    assert done == ["select", *(["sample", "evaluate", "register", "report"] if kept else [])]
