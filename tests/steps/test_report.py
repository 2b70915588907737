"""The report step: its sections, and when it is made again."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from do import do, recorded, result_of
from gated import audited

from ncsn.data.format import Rows, read_split, to_table
from ncsn.model.objective import objective_of
from ncsn.report.images import grid_png
from ncsn.runs.history import GAP, LOSS, TrainingHistory, loss_names
from ncsn.runs.layout import run_folder
from ncsn.tracking.client import connect

RUN = "mine"


@pytest.fixture(scope="module")
def evaluation(config, root, save_untrained) -> str:
    """The results of the steps before: a dataset, an untrained checkpoint, samples and their metrics."""
    data = do("ingest", config, RUN)
    folder = root / "checkpoint"
    save_untrained(config, data.uri, folder)
    (samples := root / "samples").mkdir()
    made = read_split(data.uri, "train").images[:4]
    pq.write_table(to_table(Rows(made, np.full(4, -1))), samples / "shard-000000000-000000004.parquet")
    for picture in (samples / "grid.png", samples / "strip.png", root / "neighbors.png"):
        picture.write_bytes(grid_png(made))
    manifest = {"checkpoint": str(folder), "nfe": 5, "seed": 0, "sampler": asdict(config.sampling.sampler)}
    (samples / "manifest.json").write_text(json.dumps(manifest))

    figures = result_of(
        "evaluate",
        uri=str(root / "evaluation.json"),
        neighbors=str(root / "neighbors.png"),
        real_images=str(root / "neighbors.png"),
        verdict="4 images made.",
        grade="copied",
        metrics={
            "eval/classifier_score_n4": 2.0,
            "eval/classifier_copies_n4": 0.25,
            "eval/classifier_excess_low_n4": 0.2,
            "eval/classifier_excess_high_n4": 0.3,
        },
        real_metrics={"eval/real_classifier_score_n4": 4.0},
        num_images=4,
        num_real_images=4,
        audit=audited(60),
    ) | {"samples": str(samples), "dataset": data.uri}
    (root / "evaluation.json").write_text(json.dumps(figures))
    return str(root / "evaluation.json")


def test_each_result_has_a_section_and_mlflow_has_the_page_which_is_made_again_for_new_ones(config, root, evaluation):
    made = do("report", config, RUN, evaluation=evaluation)
    text = Path(made.uri).read_text()
    assert (Path(made.uri), made.size) == (root / "runs" / RUN / "report" / "report.html", len(text.encode()))
    assert re.findall(r'<section id="(\w+)"', text) == ["strip", "scores", "neighbors", "timings", "lineage", "config"]
    for said in (" 20 gray images", " 8 training images", ">2<", " 256 images 60 ", "4 images made.", "num_levels: 2"):
        assert said in text
    assert "train.num_images=4</code>" in text, "half of 8: it copies"
    connection = connect(config)
    (whole,) = connection.client.search_runs([connection.experiment_id], "tags.`ncsn.part` = 'run'")
    kept = connection.client.download_artifacts(whole.info.run_id, "report.html", str(root))
    assert Path(kept).read_bytes() == Path(made.uri).read_bytes()
    assert whole.info.run_id in text

    before = Path(made.uri).stat().st_mtime_ns
    assert do("report", config, RUN, evaluation=evaluation) == made
    assert Path(made.uri).stat().st_mtime_ns == before
    folder = run_folder(config, RUN)
    history = TrainingHistory(folder.history)
    names = loss_names(objective_of(config).noise.bins.tolist())
    for seen, loss in ((4, 0.5), (8, 0.6)):
        history.add(dict(zip(names, (5.0, 0.01), strict=True)) | {LOSS: loss, GAP: 0.1}, seen, system={}, when=seen)
    history.publish()
    decision = {"model": "ncsn-tiny", "version": "7", "promoted": False, "aliases": [], "reason": "4 is worse than 3"}
    recorded(folder, "register", result={**decision, "uri": "models:/ncsn-tiny/7"}, finished_at="2026-01-01T00:00")
    again = do("report", config, RUN, evaluation=evaluation)
    text = Path(again.uri).read_text()
    learned = ('<section id="training"', "Undertrained at sigma", "lowest at 4 images")
    for said in (*learned, "version 7 of ncsn-tiny", decision["reason"]):
        assert said in text
