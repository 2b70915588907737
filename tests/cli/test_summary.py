"""The words at the end of a run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from ncsn.cli.target import resolve
from ncsn.cli.views import print_summary
from ncsn.runs.folder import claim_run
from ncsn.runs.records import StepRecord

RESULTS: dict[str, dict[str, Any]] = {
    "ingest": {"uri": "/d", "digest": "0123456789abcdef", "counts": {"train": 1258, "test": 539}, "created": True},
    "train": {"checkpoint": "/c", "images_seen": 200064, "loss": 0.5, "images_per_second": 1500.4},
    "sample": {"uri": "/s", "grid": "/s/grid.png", "strip": "/s/strip.png", "num_images": 512, "nfe": 501},
    "evaluate": {
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


def test_summary(config_file: Path) -> None:
    target = resolve(str(config_file))
    folder = claim_run(target.config, target.run)
    records = {step: StepRecord({}, result, 10.0, "2026-01-01") for step, result in RESULTS.items()}
    stream = io.StringIO()
    print_summary(Console(file=stream, width=120), folder, target.config, records, earlier=["ingest"])
    rows = [line.split() for line in stream.getvalue().splitlines()]
    lines = [" ".join(row) for row in rows]
    assert "ingest 10.0 1,258 train + 539 test images, digest 0123456789ab (earlier)" in lines
    assert "train 10.0 200,064 images, loss 0.5000, 1,500 images/s" in lines
    assert "register 10.0 ncsn-tiny version 3 (challenger)" in lines
    assert "report 10.0 123 kB, 2 sections" in lines
    assert "all 60.0" in lines
    assert "eval/classifier_score_n512 9 ± 0.25 10 ± 0.5 0.9" in lines
    assert "eval/classifier_fid_n512 12.5 2.5 5" in lines
    assert "eval/classifier_kid_n512 0.01 -0.01" in lines
    assert "note: only 539 real images" in lines
    assert "grid /s/grid.png" in lines
    assert "report /r/report.html" in lines
    assert "model models:/ncsn-tiny/3" in lines
    assert f"next ncsn ui --run {target.run} --config {folder.config}" in lines
