"""`ncsn compile` and `ncsn submit`, in this process, to a server that keeps what it gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from kfp_api import KfpServer

from ncsn.cli.app import app
from ncsn.cli.target import resolve
from ncsn.config import from_json
from ncsn.runs.folder import claim_run
from pipelines.compile import COMPILED


def ncsn(*args: str) -> Result:
    return CliRunner().invoke(app, [*args])


@pytest.fixture
def server(kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> KfpServer:
    kfp_server.idle = True
    monkeypatch.setenv("NCSN_IMAGE", "registry.example/ncsn-python:9")
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kfp_server.url)
    return kfp_server


def only(store: dict[str, Any]) -> dict[str, Any]:
    (item,) = store.values()
    found: dict[str, Any] = item
    return found


def cached_tasks(run: dict[str, Any]) -> set[str]:
    components = run["pipeline_spec"]["pipeline_spec"]["components"]
    tasks = components["comp-exit-handler-1"]["dag"]["tasks"]
    return {name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")}


def test_compile_writes_what_is_committed(tmp_path: Path) -> None:
    done = ncsn("compile", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert {Path(line) for line in done.stdout.splitlines()} == set(tmp_path.iterdir())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        path.name: path.read_text() for path in COMPILED.glob("*.yaml")
    }


def test_submit_sends_the_resolved_config_and_prints_the_page(server: KfpServer, config_file: Path) -> None:
    done = ncsn("submit", "--config", str(config_file), "--set", "noise.num_levels=7", "--service-account", "mine")
    assert done.exit_code == 0, done.output
    run = only(server.runs)
    assert done.stdout == f"{server.url}/#/runs/details/{run['run_id']}\n"
    target = resolve(str(config_file), overrides=["noise.num_levels=7"])
    arguments = run["runtime_config"]["parameters"]
    assert from_json(arguments["config"]) == target.config
    assert arguments["run"] == run["display_name"] == target.run
    assert run["service_account"] == "mine"
    assert only(server.experiments)["display_name"] == "ncsn"
    assert cached_tasks(run) == {"ingest", "tune", "train", "sample", "evaluate"}
    assert done.stderr.startswith("cache: ")


def test_no_cache_reaches_every_task(server: KfpServer, config_file: Path) -> None:
    done = ncsn("submit", "--config", str(config_file), "--run", "again", "--no-cache", "--experiment", "e", "--json")
    assert done.exit_code == 0, done.output
    run = only(server.runs)
    assert json.loads(done.stdout)["id"] == run["run_id"]
    assert run["display_name"] == "again"
    assert cached_tasks(run) == set()
    assert done.stderr.startswith("cache: ")


def test_every_makes_a_schedule_whose_runs_name_themselves(server: KfpServer, config_file: Path) -> None:
    done = ncsn("submit", "--config", str(config_file), "--every", "0 3 * * 1")
    assert done.exit_code == 0, done.output
    recurring = only(server.recurring_runs)
    assert done.stdout == f"{server.url}/#/recurringrun/details/{recurring['recurring_run_id']}\n"
    assert recurring["runtime_config"]["parameters"]["run"] == ""
    assert cached_tasks(recurring) == set(), "images may change between two runs"
    assert server.runs == {}


def test_images_that_cannot_be_seen_from_here_are_not_cached(server: KfpServer, config_file: Path) -> None:
    elsewhere = ("--set", "data.source=fashion_mnist", "--set", "data.root=/mnt/of/the/cluster")
    done = ncsn("submit", "--config", str(config_file), *elsewhere)
    assert done.exit_code == 0, done.output
    assert "data.root" in done.stderr
    assert "ingest" not in cached_tasks(only(server.runs))
    assert "content" not in only(server.runs)["runtime_config"]["parameters"]


def test_weights_that_no_pod_has_are_refused_before_anything_is_trained(server: KfpServer, config_file: Path) -> None:
    def submit(weights: str) -> Result:
        settings = ("evaluation.extractor=inception", f"evaluation.weights={weights}")
        return ncsn("submit", "--config", str(config_file), *(part for each in settings for part in ("--set", each)))

    done = submit("inception.pth")
    assert done.exit_code == 2
    assert "error: evaluation.weights = 'inception.pth': " in done.stderr
    assert server.runs == {}
    for reachable in ("https://example.com/inception.pth", "s3://ncsn/inception.pth", "/mnt/inception.pth"):
        assert submit(reachable).exit_code == 0
    assert len(server.runs) == 3


def test_a_registered_model_is_sampled_by_its_own_config(server: KfpServer, tmp_path: Path) -> None:
    settings = [f"storage.root={tmp_path}", "sampling.num_images=8"]
    options = [part for setting in settings for part in ("--set", setting)]
    model = "model=models:/ncsn-tiny@champion"
    done = ncsn("submit", "--pipeline", "sample", *options, "--param", model, "--param", "evaluated=true")
    assert done.exit_code == 0, done.output
    run = only(server.runs)
    assert run["display_name"] == "ncsn-tiny@champion"
    assert run["runtime_config"]["parameters"] == {
        "model": "models:/ncsn-tiny@champion",
        "root": str(tmp_path),
        "overrides": settings,
        "evaluated": True,
    }


@pytest.mark.parametrize(
    ("args", "subject"),
    [
        (["--param", "model=models:/x/1"], "storage.root"),
        (["--set", "storage.root=s3://b/p"], "--param"),
        (["--set", "storage.root=s3://b/p", "--param", "root=x"], "--param 'root'"),
        (["--set", "storage.root=s3://b/p", "--config", "c.yaml"], "--config"),
    ],
)
def test_a_mistake_about_a_model_is_one_line(server: KfpServer, args: list[str], subject: str) -> None:
    done = ncsn("submit", "--pipeline", "sample", *args)
    assert done.exit_code == 2, done.output
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("cache: ")]
    assert error.startswith(f"error: {subject}: ")
    assert server.runs == {}


@pytest.mark.parametrize(
    ("args", "subject"),
    [
        (["--set", "storage.root=.ncsn"], "storage.root = '.ncsn'"),
        (["--param", "runn=x"], "--param 'runn'"),
        (["--param", "run=x"], "--param 'run'"),
        (["--param", "nonsense"], "--param 'nonsense'"),
        (["--pipeline", "cook"], "--pipeline 'cook'"),
        (["--every", "@daily", "--wait"], "--wait"),
        (["--namespace", "me"], "--namespace 'me'"),
        (["--host", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
    ],
)
def test_a_mistake_is_one_line(server: KfpServer, config_file: Path, args: list[str], subject: str) -> None:
    done = ncsn("submit", "--config", str(config_file), *args)
    assert done.exit_code == 2, done.output
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("cache: ")]
    assert error.startswith(f"error: {subject}: ")
    assert done.stdout == ""
    assert server.runs == server.recurring_runs == {}


def test_an_image_that_nobody_has_named_is_refused(
    server: KfpServer, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCSN_IMAGE")
    done = ncsn("submit", "--config", str(config_file))
    assert done.exit_code == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: NCSN_IMAGE: ")
    assert server.runs == {}


def test_a_run_name_of_another_config_is_refused_where_the_store_can_be_read(
    server: KfpServer, config_file: Path
) -> None:
    config = resolve(str(config_file), overrides=[]).config
    claim_run(config, "theirs")
    mine = ("submit", "--config", str(config_file), "--run", "theirs")
    assert ncsn(*mine).exit_code == 0, "the same experiment again"
    done = ncsn(*mine, "--set", "seed=9")
    assert done.exit_code == 2
    assert "error: --run 'theirs': " in done.stderr
    assert "seed" in done.stderr
    assert len(server.runs) == 1


def test_compile_sizes_the_pods_for_a_config(config_file: Path, tmp_path: Path) -> None:
    gpus = ("--set", "compute.use_gpu=true", "--set", "compute.num_workers=2")
    done = ncsn("compile", "--out", str(tmp_path), "--config", str(config_file), *gpus)
    assert done.exit_code == 0, done.output
    assert "nvidia.com/gpu" in (tmp_path / "train_pipeline.yaml").read_text()
