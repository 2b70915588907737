"""What a person sees while a step works."""

from __future__ import annotations

import io
from collections.abc import Iterable

import pytest
from rich.console import Console

from ncsn.cli.console import ProgressView
from ncsn.runs.records import StepProgress


def shown(*, terminal: bool, done: Iterable[int]) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    with ProgressView(console) as view:
        view.start("train")
        for images in done:
            view.update("train", StepProgress(images, 1000, "images"))
        view.finish("train", "done in 2.0 s")
    return stream.getvalue()


def test_without_a_terminal_a_few_plain_lines() -> None:
    lines = shown(terminal=False, done=range(0, 1001, 10)).splitlines()
    assert lines == [
        "train     starting",
        "train     250 / 1,000 images",
        "train     500 / 1,000 images",
        "train     750 / 1,000 images",
        "train     1,000 / 1,000 images",
        "train     done in 2.0 s",
    ]


def test_lines_never_go_back_after_a_failure() -> None:
    lines = shown(terminal=False, done=[250, 500, 500, 260, 510, 760, 1000]).splitlines()
    counts = [int(line.split()[1].replace(",", "")) for line in lines if "images" in line]
    assert counts == [250, 500, 760, 1000]


def test_on_a_terminal_a_bar_that_leaves_one_line() -> None:
    text = shown(terminal=True, done=range(500, 501))
    assert "500 / 1,000 images" in text
    assert "━" in text
    assert "✓ train     done in 2.0 s" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_total_that_is_not_known(terminal: bool) -> None:
    stream = io.StringIO()
    with ProgressView(Console(file=stream, force_terminal=terminal, width=100)) as view:
        view.start("ingest")
        view.update("ingest", StepProgress(5, 0, "images"))
        view.finish("ingest", "already done")
    assert "already done" in stream.getvalue()
