"""What a person reads: commands, summaries, progress and documented configs; tests look at numbers and keys."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO, cast

import pytest
from click.testing import CliRunner
from do import result_of
from rich.console import Console

from ncsn.cli import app
from ncsn.cli.console import Log, ProgressView, console_on, print_summary, shown_progress
from ncsn.cli.target import TargetOptions
from ncsn.config import flatten, from_yaml
from ncsn.init.draft import documented_yaml
from ncsn.progress import Progress, say
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import Finished
from ncsn.runs.steps import STEP_TABLE

SHOWN: dict[str, dict[str, Any]] = {
    "ingest": {"digest": "0123456789abcdef", "counts": {"train": 1258, "test": 539}},
    "train": {"images_seen": 200064, "loss": 0.5, "images_per_second": 1500.4},
    "sample": {"num_images": 512, "nfe": 501},
    "evaluate": {
        "metrics": {
            "eval/classifier_score_n512": 9.0,
            "eval/classifier_fid_n512": 12.5,
            "eval/classifier_fid_low_n512": 10.27,
            "eval/classifier_fid_high_n512": 15.21,
        },
        "real_metrics": {"eval/real_classifier_score_n539": 10.0, "eval/real_classifier_fid_n539": 2.5},
        "verdict": "512 images made.",
        "grade": "far",
        "notes": ["only 539 real images, such as [/b]/1.png"],
        "num_images": 512,
    },
    "register": {
        "model": "ncsn-tiny",
        "version": "3",
        "promoted": False,
        "reason": "12.5 is worse than 11",
        "utility": "They help",
    },
    "report": {"uri": "/r/report.html", "size": 123_456},
}


def test_help_lists_each_command_in_one_of_four_groups() -> None:
    text = CliRunner().invoke(app, ["--help"], prog_name="ncsn", terminal_width=100).output
    _, *groups = re.split(r"^(?:Start|Steps|Results|Cluster):$", text[text.index("Options:") :], flags=re.MULTILINE)
    names = [re.findall(r"^  ([a-z-]+) {2,}", group, flags=re.MULTILINE) for group in groups]
    shown = [name for group in names for name in group]
    assert sorted(shown) == sorted({*app.commands, *STEP_TABLE})
    assert len(names) == 4 and len(names[0]) == 9 and names[0][:2] == ["init", "run"]


def test_a_summary_has_scores_next_to_real_images_and_what_comes_next(config_file: Path) -> None:
    config = TargetOptions(str(config_file), ("storage.root=/store",)).resolve().config
    folder = RunFolder("/store", "mine")
    records = {
        step: Finished(step, {}, result_of(step, **known), "2026-01-01", seconds=10.0) for step, known in SHOWN.items()
    }
    print_summary(console_on(stream := io.StringIO()), folder, config, records)
    text = stream.getvalue()
    assert re.search(r"classifier_fid_n512 +12 \(10 to 15\) +2\.5", text) and re.search(r"score_n512 +9 +10 ", text)
    for part in (
        "60.0",
        "only 539 real images, such as [/b]/1.png",
        "12.5 is worse than 11",
        "/r/report.html",
        "ncsn ui --run mine",
    ):
        assert part in text
    verdict, helped, then, *_ = text.splitlines()
    longer = f"ncsn run {folder.options(config)} --set train.num_images={2 * config.train.num_images}"
    assert (verdict, helped) == ("512 images made.", "They help") and longer in then


def progress(*, terminal: bool, done: Iterable[int], total: int = 1000, then: Iterable[int] = ()) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    view = ProgressView(console)
    with view.bars:
        view.start("train")
        for images in done:
            view.update("train", Progress(images, total, "images"))
        for updates in then:
            view.update("train", Progress(updates, total, "updates"))
        view.finish("train", "done in 2.0 s")
    return stream.getvalue()


def test_progress_is_one_line_on_a_terminal_and_elsewhere_a_few_and_none_for_repeated_work() -> None:
    for total in (1000, 0):  # 0 is unknown
        text = progress(terminal=True, done=[500], total=total)
        assert f"500 / {total:,} images" in text and "━" in text and "✓ train     done in 2.0 s" in text
    shown = re.findall(r"([\d,]+) / ", progress(terminal=False, done=range(0, 1001, 10)))
    assert shown == ["250", "500", "750", "1,000"]
    after_a_failure = progress(terminal=False, done=[250, 500, 500, 260, 510, 760, 1000])
    assert re.findall(r"([\d,]+) / ", after_a_failure) == ["250", "500", "760"]


def test_each_part_of_a_step_is_shown_if_it_takes_its_time(monkeypatch) -> None:
    for every, shown in ((30.0, ["500 / 1,000 images"]), (0.0, ["500 / 1,000 images", "100 / 1,000 updates"])):
        monkeypatch.setattr("ncsn.cli.console._LINE_EVERY_SECONDS", every)
        assert re.findall(r"[\d,]+ / 1,000 \w+", progress(terminal=False, done=[500], then=[100])) == shown


def test_the_log_shows_a_retry_on_the_terminal_in_one_line_also_if_the_disk_is_full(tmp_path: Path) -> None:
    text = "starting\n\x1b[36m(TrainController pid=7)\x1b[0m retry: worker 0: [Errno 28] full\n"
    for path in (tmp_path / "log.txt", Path("/dev/full")):
        stream = io.StringIO()
        with closing(Log(path.open("w", buffering=1), Console(file=stream, width=20))) as log:
            print(text, end="", file=cast(TextIO, log), flush=True)
        assert stream.getvalue() == "retry: worker 0: [Errno 28] full\n"
    assert (tmp_path / "log.txt").read_text() == text


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_launcher_says_is_shown_while_the_rest_goes_to_the_log(tmp_path, monkeypatch, *, terminal) -> None:
    """With the log of the driver, unless bars show its progress."""
    stream, log = io.StringIO(), tmp_path / "log.txt"
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    with shown_progress(log):
        sys.stderr.write("chatter\n")
        say("RayJob mine: Running")
        say("retry: MLflow is away")
        say("train 10 / 20 images", of_driver=True)
    counts = [stream.getvalue().count(line) for line in log.read_text().splitlines()]
    assert counts == [0, 1, 1, 0 if terminal else 1]


def test_a_documented_config_has_meaning_range_and_default_above_each_setting(config_file: Path) -> None:
    config = from_yaml(config_file.read_text())
    for path in (config_file, *(Path(__file__).parents[2] / "configs").glob("*.yaml")):
        same = from_yaml(path.read_text())
        assert from_yaml(documented_yaml(same)) == same, path
    lines = [line.strip() for line in documented_yaml(config).splitlines()]
    for path in flatten(config):
        at = next(index for index, line in enumerate(lines) if line.startswith(f"{path.split('.')[-1]}:"))
        assert lines[at - 1].startswith("# "), path
    text = " ".join(line.removeprefix("# ") for line in lines)
    of_dtype = "[one of uint8, uint16, float32; default uint8] dtype:"
    for limits in ("[>= 0; < 1; default 0.999] per_step:", "[>= 1; <= 8] channels:", of_dtype):
        assert limits in text
