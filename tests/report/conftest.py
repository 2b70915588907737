"""A page with every part."""

from __future__ import annotations

import numpy as np
import pytest

from ncsn.report.diagnostics import held_out_section, training_section
from ncsn.report.images import grid_png, neighbors, strip_png
from ncsn.report.page import Fact, Page, Picture, Scores, Section, Tile, Timing
from ncsn.report.words import score_rows
from ncsn.runs.curves import HeldOutCurves

METRICS = {
    "eval/classifier_score_n64": 1.23,
    "eval/classifier_score_std_n64": 0.00123,
    "eval/classifier_fid_n64": 14.0,
    "eval/classifier_kid_n64": -0.00123,
    "eval/classifier_kid_std_n64": 0.00123,
    "eval/classifier_memorised_n64": 1 / 64,
    "eval/classifier_test_accuracy": 0.97,
}
REAL_METRICS = {
    "eval/real_classifier_score_n60": 1.24,
    "eval/real_classifier_score_std_n60": 0.00345,
    "eval/real_classifier_fid_n60": 7.0,
    "eval/real_classifier_kid_n60": -0.00421,
    "eval/real_classifier_kid_std_n60": 0.00882,
    "eval/real_classifier_memorised_n60": 0.0,
}


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="session")
def page(images: np.ndarray) -> Page:
    """Every part of a report, with a long URI."""
    sigmas = [1.0, 0.3, 0.1, 0.03]
    line = {
        "image": 0,
        "memorised": True,
        "pixels_rows": [3, 4],
        "features_rows": [5, 6],
        "pixels_distances": [10.0, 99.0],
    }
    rows, more = score_rows(METRICS, REAL_METRICS)
    losses = np.linspace(0.9, 0.2, 12)[:, None] * np.array([0.1, 0.3, 0.6, 1.0])
    training = training_section(range(100, 1300, 100), losses, sigmas=sigmas, linear=np.full(4, 0.1))
    seen = np.arange(300.0, 1300, 300)
    overfit = HeldOutCurves(seen, np.array([0.7, 0.4, 0.45, 0.5]), seen / 5000)
    inpainting = Picture(grid_png(images[:16]), alt="completions", caption="Half of each image was given.")
    return Page(
        title="digits",
        run="digits-0123abcd",
        finished_at="2026-01-01 12:00",
        verdict="champion",
        lead=["The model was trained.", "It is version 1 of a-model."],
        tiles=[Tile("score", "96%", "of the score of real images"), Tile("copies", "1", "among 64 samples")],
        samples=Picture(grid_png(images), alt="a grid of generated images", caption="The first images."),
        scores=Scores(
            rows,
            more,
            measured="By a classifier.",
            fingerprint="f" * 64,
            real="real images",
            notes=["only 60 real images"],
        ),
        strip=Picture(strip_png(np.stack([images[:8]] * 5)), alt="a strip"),
        neighbors=neighbors([line, {**line, "image": 1, "memorised": False}], samples=images, training_images=images),
        neighbors_text="The numbers are pixel distances.",
        neighbors_hints=["The generated images are nearer to the training images than held-out images are."],
        sections=[
            held_out_section(overfit),
            training,
            Section("Inpainting", "", pictures=[inpainting], table=[("NFE", "FID"), ("10", "14")]),
        ],
        timings=[Timing("train", "100.0 s", "1,000 images", 100.0), Timing("sample", "5.0 s", "64 images", 5.0)],
        total="105.0 s",
        costs=[Fact("Reserved", "6.0 min · 0.2 CPU hours")],
        lineage=[
            Fact("Checkpoint", "s3://bucket/" + "a-long-prefix/" * 8 + "checkpoints/images-000001000"),
            Fact("MLflow run", "0123", link="http://127.0.0.1:5000/#/experiments/1/runs/0123"),
        ],
        config="name: digits\nseed: 0\n",
    )
