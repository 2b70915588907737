"""What a person reads, compared with tests/cli/snapshots; RENEW_SNAPSHOTS=1 stores it again."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from ncsn.cli import app
from ncsn.cli.commands.registry import _tree
from ncsn.cli.console import ProgressView
from ncsn.cli.doctor import Finding, report
from ncsn.cli.target import Experiment
from ncsn.cli.views import (
    describe_result,
    describe_suggestion,
    print_account,
    print_plan,
    print_prediction,
    print_summary,
)
from ncsn.config import Config, flatten, from_yaml
from ncsn.core.noise_schedule import NoiseSuggestion, PairDistances
from ncsn.runs.folder import RunFolder
from ncsn.runs.progress import StepProgress
from ncsn.runs.records import StepRecord
from ncsn.tools.draft import documented_yaml
from ncsn.tracking.lineage import Link

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
RESULTS: dict[str, dict[str, Any]] = {
    "ingest": {"uri": "/d", "digest": "0123456789abcdef", "counts": {"train": 1258, "test": 539}, "created": True},
    "train": {"checkpoint": "/c", "images_seen": 200064, "loss": 0.5, "images_per_second": 1500.4},
    "sample": {"uri": "/s", "grid": "/s/grid.png", "strip": "/s/strip.png", "num_images": 512, "nfe": 501},
    "evaluate": {
        "uri": "/e",
        "metrics": {
            "eval/classifier_test_accuracy": 0.97,
            "eval/classifier_score_n512": 9.0,
            "eval/classifier_score_std_n512": 0.25,
            "eval/classifier_fid_n512": 12.5,
            "eval/classifier_kid_n512": 0.01,
        },
        "real_metrics": {
            "eval/real_classifier_score_n539": 10.0,
            "eval/real_classifier_score_std_n539": 0.5,
            "eval/real_classifier_fid_n539": 2.5,
            "eval/real_classifier_kid_n539": -0.01,
        },
        "gate": {"name": "eval/classifier_fid_n512", "value": 12.5},
        "notes": ["only 539 real images"],
    },
    "register": {
        "model": "ncsn-tiny",
        "version": "3",
        "aliases": ["challenger"],
        "reason": "12.5 is worse than 11",
        "uri": "models:/ncsn-tiny/3",
    },
    "report": {"uri": "/r/report.html", "size": 123_456, "sections": ["scores", "config"]},
}


def printed(draw: Callable[[Console], None]) -> str:
    stream = io.StringIO()
    draw(Console(file=stream, width=120))
    return stream.getvalue()


def test_help(snapshot) -> None:
    snapshot("help", CliRunner().invoke(app, ["--help"], prog_name="ncsn", terminal_width=100).output)


def test_options_of_every_command(snapshot) -> None:
    options = {
        name: " ".join(option for parameter in command.params for option in parameter.opts)
        for name, command in app.commands.items()
    }
    snapshot("options", "\n".join(f"{name}: {found}" for name, found in options.items()))


def test_summary(snapshot, config_file: Path) -> None:
    config = Experiment(str(config_file), ("storage.root=/store",)).resolve().config
    folder = RunFolder("/store", "mine")
    records = {step: StepRecord({}, result, 10.0, "2026-01-01") for step, result in RESULTS.items()}
    snapshot("summary", printed(lambda console: print_summary(console, folder, config, records, earlier=["ingest"])))


@pytest.mark.parametrize("step", ["evaluate", "sample"])
def test_result_of_a_step(snapshot, step: str) -> None:
    snapshot(f"result-{step}", describe_result(step, RESULTS[step]))


def test_result_of_a_search(snapshot) -> None:
    def trial(number: int, images: int, objective: float | None, status: str, reason: str = "") -> dict[str, Any]:
        sampler = {"epsilon": 1e-4} if objective else None
        values = {"noise.sigma_1": 1.0 + number, "train.batch_size": 64}
        row = {"trial": number, "values": values, "sampler": sampler, "images_seen": images, "seconds": 1234.5}
        return row | {"objective": objective, "status": status, "reason": reason}

    trials = [
        trial(0, 70000, 84.31, "finished"),
        trial(1, 70000, 45.62, "finished"),
        trial(2, 8000, 238.0, "stopped"),
        trial(3, 0, None, "failed", "loss is NaN"),
    ]
    found = {"values": {"noise.sigma_1": 2.0, "train.batch_size": 64}, "sampler": {"epsilon": 1e-4}, "trials": trials}
    found |= {"objective_name": "eval/classifier_fid_n128", "objective": 45.62, "baseline": 84.31}
    snapshot("result-tune", describe_result("tune", found | {"config": "/search/best.yaml", "table": "/search"}))


def test_suggestion(snapshot) -> None:
    distances = PairDistances(num_images=1258, exact=True, maximum=4.8, quantile_999=4.2)
    suggestion = NoiseSuggestion(4.8, 0.03, 20, 1.3063, 0.5, 5, 1.234e-4, 1.02, distances)
    text = describe_suggestion(suggestion, sigma_data=0.4128)
    assert yaml.safe_load(text)["noise"] == {"sigma_1": 4.8, "sigma_L": 0.03, "num_levels": 20}
    snapshot("suggestion", text)


def test_prediction(snapshot) -> None:
    costs = {"seconds": 64_000.0, "cpu_hours": 17.8, "gpu_hours": 17.8, "money": 45.4, "kwh": 14.1}
    found = {
        "tflops": 396.0,
        "workers": 1,
        "parameters": 55_733_891,
        "gflop": {"sample": 42.38, "train": 127.14},
        "images_per_second": 3_113.0,
        "nfe": 35,
        "steps": {"train": costs, "sample": {**costs, "seconds": 187.0}},
        "worker_gb": 44.0,
        "notes": ["few images train the highest level"],
        "prices": {"currency": "USD"},
    }
    snapshot("prediction", printed(lambda console: print_prediction(console, found)))


def test_plan_and_ledger(snapshot) -> None:
    def cost(seconds: float) -> dict[str, float]:
        return {"seconds": seconds, "cpu_hours": seconds / 1800, "gpu_hours": 0.0, "money": seconds / 1e5, "kwh": 0.01}

    plan: dict[str, Any] = {
        "prices": {"currency": "USD"},
        "steps": {"ingest": cost(3.4), "train": cost(12_600.0)},
        "total": cost(12_603.4),
        "start_seconds": 20.0,
        "memory": {"worker_gb": 0.66, "workers_gb": 1.32, "machine_gb": 24.0, "fits": False},
        "pods": {"count": 2, "workers": 4, "cpus": 8, "gpus": 4, "memory_gb": 16.0},
        "storage": {
            "store_gb": 0.1,
            "dataset_gb": 0.02,
            "checkpoints_gb": 0.07,
            "samples_gb": 0.01,
            "money_per_month": 0.0023,
            "node_cache_gb": 0.02,
        },
        "rates": {"train_image": 1 / 1311, "sample_evaluation": 0.0123},
    }
    actual = {"steps": {"train": cost(13_000.0), "sample": cost(400_000.0)}, "total": cost(413_000.0)}
    account = {"plan": plan, "actual": actual, "prices": plan["prices"]}
    nothing = {"plan": None, "actual": {"steps": {}}, "prices": plan["prices"]}
    snapshot("plan", printed(lambda console: print_plan(console, plan)))
    snapshot("account", printed(lambda console: [print_account(console, each) for each in (account, nothing)]))


def test_trace(snapshot) -> None:
    model = Link("model version", "models:/ncsn-tiny/3", {"promoted_by": "gate"}, asked=True)
    train = Link("step", "train", {"ray_job": "01000000"}, (Link("checkpoint", "/c"), model))
    snapshot("trace", printed(lambda console: console.print(_tree(Link("MLflow run", "5f3a", links=(train,))))))


def test_doctor(snapshot, capsys: pytest.CaptureFixture[str]) -> None:
    well = report([Finding("store", "ok", "/store: read, written and deleted")], as_json=False)
    ill = report([Finding("mlflow", "failed", "no answer", "export MLFLOW_TRACKING_URI=URL")], as_json=False)
    assert (well, ill) == (True, False)
    snapshot("doctor", capsys.readouterr().out)


def progress(*, terminal: bool, done: Iterable[int], total: int = 1000) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    with ProgressView(console) as view:
        view.start("train")
        for images in done:
            view.update("train", StepProgress(images, total, "images"))
        view.finish("train", "done in 2.0 s")
    return stream.getvalue()


def test_progress_without_a_terminal(snapshot) -> None:
    snapshot("progress", progress(terminal=False, done=range(0, 1001, 10)))
    after_a_failure = progress(terminal=False, done=[250, 500, 500, 260, 510, 760, 1000])
    assert re.findall(r"([\d,]+) / ", after_a_failure) == ["250", "500", "760", "1,000"]


@pytest.mark.parametrize("total", [1000, 0], ids=["known", "unknown"])
def test_progress_on_a_terminal_leaves_one_line(total: int) -> None:
    text = progress(terminal=True, done=[500], total=total)
    assert f"500 / {total:,} images" in text and "━" in text
    assert "✓ train     done in 2.0 s" in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_documented_config_is_the_config(path: Path) -> None:
    config = from_yaml(path.read_text())
    assert from_yaml(documented_yaml(config)) == config


def comment_above(text: str, line_start: str) -> str:
    lines = text.splitlines()
    end = next(index for index, line in enumerate(lines) if line.strip().startswith(line_start))
    start = end
    while lines[start - 1].strip().startswith("#"):
        start -= 1
    return " ".join(line.strip().removeprefix("# ") for line in lines[start:end])


def test_documented_config_has_meaning_range_and_default(config_file: Path) -> None:
    config = from_yaml(config_file.read_text())
    text = documented_yaml(config)
    assert yaml.safe_load(text).keys() == Config.model_fields.keys()
    assert "\n\n# A search for" in text
    for path in flatten(config):
        assert comment_above(text, f"{path.split('.')[-1]}:")
    assert Config.model_fields["seed"].description
    assert comment_above(text, "seed:").startswith(Config.model_fields["seed"].description)
    assert comment_above(text, "per_step:").endswith("[>= 0; < 1; default 0.999]")
    assert comment_above(text, "decay:").endswith("[one of constant, linear, cosine; default constant]")
    assert comment_above(text, "channels:").endswith("[one of 1, 3]")
    assert comment_above(text, "network:").endswith("ncsn, ncsnv2, ddpmpp.")
