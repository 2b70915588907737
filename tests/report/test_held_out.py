"""Signs of overfitting in words and in the report's section."""

from __future__ import annotations

import numpy as np

from ncsn.report.diagnostics import NEAR, copying_hints, held_out_section, overfitting_hints
from ncsn.report.plots import held_out_losses
from ncsn.report.style import PALETTE
from ncsn.report.words import read_metrics
from ncsn.runs.curves import HeldOutCurves
from ncsn.runs.gaps import Gaps

SIGMAS = np.array([1.0, 0.3, 0.1, 0.03])


def curves(gap: list[float], *, losses: tuple[float, ...] = (0.6, 0.4, 0.5)) -> HeldOutCurves:
    last = Gaps(np.array([0.2, 0.4, 0.6, 0.8]), np.array(gap), np.full(4, 0.005))
    loss = np.array(losses)
    return HeldOutCurves(1000.0 * np.arange(1, len(loss) + 1), loss, 0.1 * loss, SIGMAS, last)


def test_a_harmful_gap_is_told_with_its_numbers() -> None:
    (hint,) = overfitting_hints(curves([0.0, 0.1, 0.3, 0.0]))
    for fact in ("overfits", "sigma 0.1 to 0.3", "0.6 ", "0.3 ", "lowest at 2,000 images"):
        assert fact in hint
    (hint,) = overfitting_hints(curves([0.0, 0.1, 0.3, 0.0], losses=(0.6, 0.5, 0.4)))
    assert "lowest" not in hint


def test_a_small_gap_is_told_apart_and_chance_is_not_told() -> None:
    (hint,) = overfitting_hints(curves([0.0, 0.0, 0.025, 0.03]))
    assert "begins" in hint and "5%" in hint and "sigma 0.03 to 0.1" in hint
    assert overfitting_hints(curves([0.0, 0.3, 0.0, 0.3])) == []
    assert held_out_section(curves([0.0, 0.3, 0.0, 0.3])).hints == []


def test_the_plot_holds_both_losses_and_marks_the_alarm() -> None:
    figure = held_out_losses(
        [1000, 2000],
        [0.5, 0.4],
        [0.4, 0.2],
        sigmas=SIGMAS,
        gap=[0.0, 0.1, 0.2, 0.0],
        error=[0.01, 0.02, np.nan, 0.01],
        alarmed=(1, 2),
    )
    left, right = figure.axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in left.get_lines()}
    assert lines == {"training images": [0.4, 0.2], "held-out images": [0.5, 0.4]}
    points = {container.lines[0].get_color(): container.lines[0].get_xydata() for container in right.containers}
    np.testing.assert_allclose(points[PALETTE[1]], [[0.3, 10], [0.1, 20]])
    section = held_out_section(curves([0.0, 0.1, 0.3, 0.0]))
    assert section.plots[0].svg.startswith("<svg") and "held-out images" in section.plots[0].svg


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
