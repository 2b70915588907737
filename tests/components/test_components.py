"""A component runs its step and leaves the result in KFP's artifacts. The e2e test runs them all through KFP."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from kfp import dsl

from components import KFP_RUN_ID, experiment, headline, publish, publish_metrics, publish_pictures, publish_scores
from components.ingest import ingest
from components.train import train
from ncsn.config import from_yaml, to_json

DIGITS = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()


@dataclass(frozen=True)
class Result:
    uri: str
    count: int


def test_ingest_hands_over_the_data_set(tmp_path: Path) -> None:
    config = from_yaml(DIGITS, overrides=[f"storage.root={tmp_path}/store", "data.max_images=16"])
    dataset = dsl.Dataset(uri=str(tmp_path / "dataset"))
    metrics = dsl.Metrics(uri=str(tmp_path / "metrics"))
    ingest.python_func(config=to_json(config), run="mine", content="of these", dataset=dataset, metrics=metrics)
    assert Path(dataset.metadata["uri"], "manifest.json").is_file()
    assert json.loads(Path(dataset.path).read_text())["digest"] == dataset.metadata["digest"]
    assert metrics.metadata == {"ingest/train_images": 16.0, "ingest/test_images": 16.0}


def test_a_failed_step_fails_its_component(tmp_path: Path) -> None:
    config = from_yaml(DIGITS, overrides=[f"storage.root={tmp_path}/store"])
    nowhere = dsl.Dataset(uri=str(tmp_path / "dataset"), metadata={"uri": str(tmp_path / "nowhere")})
    model, metrics = dsl.Model(uri=str(tmp_path / "model")), dsl.Metrics(uri=str(tmp_path / "metrics"))
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere.*run `ncsn ingest` first"):
        train.python_func(config=to_json(config), run="mine", dataset=nowhere, checkpoint=model, metrics=metrics)
    assert not Path(model.path).exists()


def test_publish_writes_the_result_and_its_uris(tmp_path: Path) -> None:
    artifact = dsl.Artifact(uri=str(tmp_path / "artifact"))
    publish(artifact, Result("/x", 3), uri="/x")
    assert json.loads(Path(artifact.path).read_text()) == {"uri": "/x", "count": 3}
    assert artifact.metadata == {"uri": "/x"}


def test_metrics_without_a_value_are_left_out(tmp_path: Path) -> None:
    metrics = dsl.Metrics(uri=str(tmp_path / "metrics"))
    publish_metrics(metrics, {"train/loss": None, "train/images_seen": 5})
    assert metrics.metadata == json.loads(Path(metrics.path).read_text()) == {"train/images_seen": 5.0}


def test_pictures_are_inside_the_page(tmp_path: Path) -> None:
    page = dsl.HTML(uri=str(tmp_path / "page"))
    publish_pictures(page, {"samples": b"PNG"})
    text = Path(page.path).read_text()
    assert "data:image/png;base64,UE5H" in text
    assert "http" not in text


def test_scores_are_two_tables(tmp_path: Path) -> None:
    page = dsl.Markdown(uri=str(tmp_path / "page"))
    publish_scores(page, {"eval/score": 9.123456}, {"eval/real_score": 10.0})
    text = Path(page.path).read_text()
    assert "| `eval/score` | 9.123 |" in text
    assert "| `eval/real_score` | 10 |" in text


def test_a_run_without_a_name_is_named_after_kfps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KFP_RUN_ID, "2c6e0f0e-1111-2222-3333-444444444444")
    assert experiment(DIGITS, "")[1] == "digits-2c6e0f0e"
    config, name = experiment(DIGITS, "mine")
    assert (config, name) == (from_yaml(DIGITS), "mine")
    monkeypatch.delenv(KFP_RUN_ID)
    with pytest.raises(ValueError, match="the parameter run is empty"):
        experiment(DIGITS, "")


def test_kfp_compares_runs_by_a_few_figures() -> None:
    figures = {
        "eval/classifier_fid_n16": 1.0,
        "eval/real_inception_score_std_n50000": 2.0,
        "eval/classifier_recall_n16": 3.0,
    }
    assert set(headline(figures)) == {"eval/classifier_fid_n16", "eval/real_inception_score_std_n50000"}
