"""Figures 2 and 3: the paper's weights, from exact and from learned scores."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn.tools import mixture
from ncsn.tools import toy as step


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> step.ToyResult:
    """The experiments with networks that have learned for a short while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "PLAIN_STEPS", 300)
        patch.setattr(step, "CONDITIONAL_STEPS", 300)
        return step.run(str(tmp_path_factory.mktemp("toy")), seed=0)


def test_annealing_finds_the_weights_and_plain_langevin_does_not(small: step.ToyResult) -> None:
    assert small.weights["exact sampling"] == pytest.approx(0.8, abs=0.04)
    assert small.weights["plain Langevin"] == pytest.approx(0.5, abs=0.06)
    assert small.weights["annealed Langevin"] == pytest.approx(0.79, abs=0.05)
    assert small.weights["annealed, learned score"] > small.weights["plain, learned score"] + 0.1
    assert small.true_weight == 0.8


def test_the_learned_score_is_right_where_there_is_data(small: step.ToyResult) -> None:
    assert small.score_error_near < 0.5 * small.score_error_elsewhere


def test_the_files_hold_the_result(small: step.ToyResult) -> None:
    stored = json.loads(Path(small.uri).read_text())
    assert stored["weights"] == small.weights
    assert stored["at_mode_5_5"]["exact sampling"]["variance"] == pytest.approx(1, abs=0.15)
    for uri in (small.figure_2, small.figure_3):
        with Image.open(io.BytesIO(Path(uri).read_bytes())) as picture:
            assert picture.size[0] > 800
            assert np.asarray(picture.convert("RGBA"))[..., 3].any()


def test_plain_langevin_follows_the_score_it_is_given() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.full((2000, 2), 3.0)
    x = mixture.plain_langevin(start, generator=generator, score=lambda x: -x)
    assert x.mean().item() == pytest.approx(0, abs=0.05) and x.var().item() == pytest.approx(1.026, abs=0.08)
