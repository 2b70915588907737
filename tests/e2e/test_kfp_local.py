"""The pipelines as KFP runs them, by `kfp.local`: each task in its own process, joined to one Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from do import ALWAYS
from kfp import local

from ncsn.config import from_yaml, to_json
from ncsn.distributed.cluster import ray_cluster
from pipelines.definitions import sample_pipeline, train_pipeline

RUN = "by-kfp"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def outputs(workplace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What each task of a run of the pipeline hands on; the Ray cluster stays."""
    one = ["compute.num_workers=1", "sampling.batch_size=16"]  # `ncsn run` has two workers and two shards
    config, folder = from_yaml(workplace.config.read_text(), overrides=one), tmp_path_factory.mktemp("kfp")
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder),
        workspace_root=str(folder / "workspace"),
        enable_caching=False,
        raise_on_error=True,
    )
    with ray_cluster(config):
        train_pipeline(config=to_json(config), run=RUN)
        yield {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("executor_output.json")}


def test_the_tasks_hand_on_what_the_steps_store(workplace, outputs: dict[str, Any]) -> None:
    assert set(outputs) == {*ALWAYS, "search", "utility", "finish"}
    metadata = {
        (step, name): artifact["artifacts"][0]["metadata"]
        for step, output in outputs.items()
        for name, artifact in output["artifacts"].items()
    }
    assert metadata["train", "checkpoint"]["uri"] == workplace.result(RUN, "train")["checkpoint"]
    for step, name in (("ingest", "dataset"), ("sample", "samples"), ("register", "model")):
        assert metadata[step, name]["uri"] == workplace.result(RUN, step)["uri"]
    shown, measured = metadata["evaluate", "metrics"], workplace.result(RUN, "evaluate")
    assert "eval/classifier_fid_n16" in shown
    assert shown.items() <= (measured["metrics"] | measured["real_metrics"]).items()
    assert metadata["finish", "outcome"]["status"] == "FINISHED"
    page = Path(outputs["finish"]["artifacts"]["page"]["artifacts"][0]["uri"]).read_text()
    assert f"`{workplace.result(RUN, 'ingest')['digest']}`" in page
    shown = outputs["report"]["artifacts"]["page"]["artifacts"][0]["uri"]
    assert Path(shown).read_bytes() == Path(workplace.result(RUN, "report")["uri"]).read_bytes()


@pytest.mark.slow
def test_a_registered_model_is_sampled(workplace, outputs: dict[str, Any]) -> None:
    few, model = ["sampling.num_images=8", "evaluation.num_splits=2"], "models:/ncsn-tiny@champion"
    sample_pipeline(model=model, root=str(workplace.root), overrides=few, evaluated=True)
    (run,) = (workplace.root / "runs").glob("ncsn-tiny-1-*")
    assert list(Path(workplace.result(run.name, "sample")["uri"]).glob("shard-*.parquet"))
    assert "eval/classifier_fid_n8" in workplace.result(run.name, "evaluate")["metrics"]
