"""A page with every part."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ncsn.config.training import DsmLossConfig
from ncsn.report import plots
from ncsn.report.images import grid_png, neighbors_png
from ncsn.report.plots import to_png, to_svg
from ncsn.report.words import Fact

EVALUATION = {
    "metrics": {
        "eval/classifier_excess_n64": 0.161,
        "eval/classifier_excess_low_n64": -0.02,
        "eval/classifier_excess_high_n64": 0.33,
        "eval/classifier_score_n64": 1.23,
        "eval/classifier_score_std_n64": 0.00123,
        "eval/classifier_fid_n64": 14.0,
        "eval/classifier_fid_n60": 15.0,
        "eval/classifier_fid_low_n60": 11.7,
        "eval/classifier_fid_high_n60": 19.0,
        "eval/classifier_kid_n64": -0.00123,
        "eval/classifier_memorized_n64": 1 / 64,
        "eval/classifier_test_accuracy": 0.97,
    },
    "real_metrics": {
        "eval/real_classifier_score_n60": 1.24,
        "eval/real_classifier_fid_n60": 7.0,
        "eval/real_classifier_fid_low_n60": 5.5,
        "eval/real_classifier_fid_high_n60": 9.1,
        "eval/real_classifier_kid_n60": -0.00421,
        "eval/real_classifier_memorized_n60": 0.0,
    },
    "verdict": "64 images made: too few test images to tell how close to real. Their distance exceeds that of real "
    "images by 16 (-2.0 to 33) % of that of noise",
    "grade": "unsure",
    "num_images": 64,
    "num_real_images": 60,
    "fingerprint": "f" * 64,
    "notes": ["only 60 real images"],
}


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="session")
def page(images: np.ndarray) -> dict[str, Any]:
    """The records of a page with every part, with a long URI."""
    sigmas, seen = [1.0, 0.3, 0.1, 0.03], np.arange(100, 1300, 100)
    losses = np.linspace(0.9, 0.2, 12)[:, None] * np.array([0.1, 0.3, 0.6, 1.0])
    lines = [{"image": row, "pixels_rows": [row + 3], "features_rows": [row + 5]} for row in range(4)]
    table = [{"name": name, "num_images": 51, "agreement": 0.9, "kid": 0.01} for name in ("zero", "one")]
    classes = {"agreement": 0.92, "real_agreement": 0.95, "table": table, "real_table": table, "by_probe": False}
    classes["confusion"] = [[50, 1], [7, 44]]
    candidate = {"images_seen": 1000, "relative_width": None, "value": 14.0, "digest": "0" * 16}
    selection = {"candidates": [candidate], "figure": "eval/classifier_fid_n64", "uri": "u", "notes": ["optimistic"]}
    search = {"trials": [{}], "objective_name": "fid", "objective": 12.0, "baseline": 15.5, "images_seen": 4096}
    plot = to_png(plots.selection_figure([candidate], metric="fid"))
    return {
        "title": "digits",
        "mirrored": True,
        "next_step": ("ncsn run --run digits-0123abcd", "this run, trained to its 280,000 images"),
        "run": "digits-0123abcd",
        "finished_at": "2026-01-01 12:00",
        "decision": {"promoted": True, "version": "1", "model": "a-model", "reason": "there was none"},
        "manifest": SimpleNamespace(
            pixels=SimpleNamespace(shape=(8, 8, 1)), source="Digits.", count=lambda _: 1000, equal_images=""
        ),
        "samples": {"nfe": 5},
        "images_seen": 1200,
        "strengths": "any strength",
        "loss": DsmLossConfig(),
        "lines": {"sample": "64 images"},
        "records": {"sample": SimpleNamespace(seconds=5.0, result={"num_images": 64, "nfe": 5})},
        "costs": [Fact("Reserved", "3 s")],
        "lineage": [
            Fact("Checkpoint", "s3://bucket/" + "a-long-prefix/" * 8 + "checkpoints/images-000001000"),
            Fact("MLflow run", "0123", link="http://127.0.0.1:5000/#/experiments/1/runs/0123"),
        ],
        "config": "name: digits\nseed: 0\n",
        "grid": grid_png(images),
        "grid_caption": "The first images.",
        "real_grid": grid_png(images),
        "strip": grid_png(images[:8].repeat(5, axis=0), columns=5),
        "evaluation": EVALUATION | {"classes": classes},
        "copying_hints": ["They are near."],
        "neighbors": neighbors_png(lines, samples=images, training_images=images),
        "confusion": to_png(plots.confusion_matrix(classes)),
        "selection": selection,
        "selection_plot": plot,
        "search": search | {"values": {"optimizer.learning_rate": 0.002}},
        "search_plots": [plot],
        "loss_plot": to_svg(plots.loss_curves(seen, losses, sigmas=sigmas), salt="lines"),
        "held_out_plot": to_svg(plots.held_out_losses(seen, losses[:, 3], losses[:, 2]), salt="held-out"),
        "training_hints": ["Train longer."],
        "held_out": "Here neither is seen.",
    }
