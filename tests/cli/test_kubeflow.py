"""`ncsn submit`, in this process, to a server that keeps what it gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from do import claimed
from kfp_api import KfpServer

from ncsn.cli.target import TargetOptions
from ncsn.config import from_yaml


@pytest.fixture
def server(kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> KfpServer:
    monkeypatch.setenv("NCSN_IMAGE", "registry.example/ncsn-python:9")
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kfp_server.url)
    return kfp_server


def only(store: dict[str, Any]) -> Any:
    (item,) = store.values()
    return item


def cached_tasks(run: dict[str, Any]) -> set[str]:
    components = run["pipeline_spec"]["pipeline_spec"]["components"]
    tasks = components["comp-exit-handler-1"]["dag"]["tasks"]
    return {name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")}


@pytest.fixture
def submit(run_in_process, server: KfpServer, config_file: Path) -> Callable[..., Result]:
    """`ncsn submit` of the experiment in `config_file`."""
    return lambda *options: run_in_process("submit", "--config", str(config_file), *options)


def test_submit_sends_the_resolved_config_and_prints_the_page(submit, server: KfpServer, config_file: Path) -> None:
    done = submit("--set", "noise.num_levels=7", "--service-account", "mine")
    assert done.exit_code == 0, done.output
    run = only(server.runs)
    assert done.stdout == f"{server.url}/#/runs/details/{run['run_id']}\n"
    target = TargetOptions(str(config_file), ("noise.num_levels=7",)).resolve()
    arguments = run["runtime_config"]["parameters"]
    assert from_yaml(arguments["config"]) == target.config
    assert arguments["run"] == run["display_name"] == target.name
    assert run["service_account"] == "mine"
    assert only(server.experiments)["display_name"] == "ncsn"
    assert cached_tasks(run) == {"ingest", "search", "train"}


def test_no_cache_reaches_every_task_nor_are_images_cached_that_cannot_be_read_from_here(submit, server) -> None:
    done = submit("--run", "again", "--no-cache", "--set", "tracking.experiment=e", "--json")
    assert done.exit_code == 0, done.output
    run = only(server.runs)
    assert (json.loads(done.stdout)["id"], run["display_name"]) == (run["run_id"], "again")
    assert only(server.experiments)["display_name"] == "e" and cached_tasks(run) == set()
    server.runs.clear()
    done = submit("--set", "data.source=fashion_mnist", "--set", "data.root=/mnt/of/the/cluster")
    assert done.exit_code == 0, done.output
    assert "ingest" not in cached_tasks(only(server.runs))
    assert "content" not in only(server.runs)["runtime_config"]["parameters"]


def test_ctrl_c_while_it_waits_says_where_the_run_goes_on(submit, server, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.wait.wait", interrupted)
    done = submit("--wait")
    assert done.exit_code == 130
    page = f"{server.url}/#/runs/details/{only(server.runs)['run_id']}"
    (line,) = (line for line in done.stderr.splitlines() if page in line)
    assert "goes on" in line


def test_every_makes_a_schedule_whose_runs_name_themselves(submit, server: KfpServer) -> None:
    done = submit("--every", "0 3 * * 1")
    assert done.exit_code == 0, done.output
    recurring = only(server.recurring_runs)
    assert done.stdout == f"{server.url}/#/recurringrun/details/{recurring['recurring_run_id']}\n"
    assert recurring["runtime_config"]["parameters"]["run"] == ""
    assert cached_tasks(recurring) == set(), "images may change between two runs"
    assert server.runs == {}


def test_a_mistake_is_one_line(run_in_process, require_mistake, server, config_file, monkeypatch) -> None:
    config, sample = ("--config", str(config_file)), ("--pipeline", "sample", "--set", "storage.root=s3://b/p")
    for args, subject in (
        (("--pipeline", "sample", "--param", "model=models:/x/1"), "storage.root"),
        (sample, "--param"),
        ((*sample, "--param", "root=x"), "--param 'root'"),
        ((*sample, *config), "--config"),
        ((*config, "--set", "storage.root=.ncsn"), "storage.root = '.ncsn'"),
        ((*config, "--param", "runn=x"), "--param 'runn'"),
        ((*config, "--param", "run=x"), "--param 'run'"),
        ((*config, "--every", "@daily", "--wait"), "--wait"),
        ((*config, "--namespace", "me"), "--namespace 'me'"),
        ((*config, "--compile-only", "/proc/x"), "--compile-only '/proc/x'"),
        ((*config, "--set", "sampling.num_images=1"), "sampling.num_images = 1"),
        ((*config, "--host", "http://127.0.0.1:9"), "http://127.0.0.1:9"),
    ):
        require_mistake(run_in_process("submit", *args), subject)
    monkeypatch.delenv("NCSN_IMAGE")
    require_mistake(run_in_process("submit", *config), "NCSN_IMAGE")
    assert server.runs == server.recurring_runs == {}


def test_a_run_name_of_another_config_is_refused_where_the_store_can_be_read(
    submit, require_mistake, server: KfpServer, config_file: Path
) -> None:
    claimed(TargetOptions(str(config_file)).resolve().config, "theirs")
    assert submit("--run", "theirs").exit_code == 0, "the same experiment again"
    require_mistake(submit("--run", "theirs", "--set", "seed=9"), "--run 'theirs'")
    assert len(server.runs) == 1


def test_compile_only_writes_the_sized_pipeline_and_starts_nothing(submit, server: KfpServer, tmp_path: Path) -> None:
    gpus = ("--set", "compute.use_gpu=true", "--set", "compute.num_workers=2")
    done = submit("--compile-only", str(tmp_path / "mine.yaml"), *gpus)
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'mine.yaml'}\n"
    assert "nvidia.com/gpu" in (tmp_path / "mine.yaml").read_text()
    assert server.runs == server.recurring_runs == {}
