"""Signs of overfitting in words and in the report's section."""

from __future__ import annotations

import numpy as np

from ncsn.report.diagnostics import NEAR, copying_hints, held_out_section
from ncsn.report.plots import held_out_losses
from ncsn.report.words import read_metrics
from ncsn.runs.curves import HeldOutCurves


def test_a_held_out_loss_that_rises_is_told_with_its_lowest_point() -> None:
    seen, loss = 1000.0 * np.arange(1, 4), np.array([0.6, 0.4, 0.5])
    section = held_out_section(HeldOutCurves(seen, loss, 0.1 * loss))
    (hint,) = section.hints
    assert "2,000 images" in hint
    assert section.plots[0].svg.startswith("<svg") and "held-out images" in section.plots[0].svg
    assert held_out_section(HeldOutCurves(seen[:2], loss[:2], loss[:2])).hints == []


def test_the_plot_holds_both_losses() -> None:
    (axes,) = held_out_losses([1000, 2000], [0.5, 0.4], [0.4, 0.2]).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()}
    assert lines == {"training images": [0.4, 0.2], "held-out images": [0.5, 0.4]}


def test_copies_and_nearness_are_warnings() -> None:
    def figures(distance: float, real: str = "") -> dict:
        return read_metrics({f"eval/{real}classifier_nn_distance_n256": distance})

    real, copies = figures(300.0, "real_"), "12 of 256 samples copy a training image"
    assert copying_hints(figures(290.0), real, copies="") == []
    assert copying_hints({}, real, copies="") == copying_hints(figures(0.0), {}, copies="") == []
    (copied,) = copying_hints(figures(290.0), real, copies=copies)
    assert copies in copied
    (near,) = copying_hints(figures(300 * NEAR - 1), real, copies="")
    assert "209" in near and "300" in near
    assert len(copying_hints(figures(0.0), real, copies=copies)) == 2
