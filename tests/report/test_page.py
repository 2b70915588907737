"""The report as text, and in a browser as KFP, MLflow and a phone show it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from do import result_of
from playwright.sync_api import Browser, Frame

from ncsn.config.training import ConsistencyLossConfig, DsmLossConfig
from ncsn.report import plots
from ncsn.report.images import grid_png, neighbors_png
from ncsn.report.pages import render
from ncsn.report.plots import to_png, to_svg
from ncsn.report.words import Fact, answers, utility_sentence
from ncsn.runs.metrics import Estimate
from ncsn.runs.results import Arm, ClassGain, UtilityResult

VIEWER = """<!doctype html><style>body { margin: 0 } iframe { border: 0; width: 100vw; height: 100vh }</style>
<iframe sandbox="allow-scripts" src="report.html"></iframe>"""
HOSTILE = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>{{ 7 * 7 }}"
EVALUATION = {
    "metrics": {
        "eval/classifier_excess_n64": 0.161,
        "eval/classifier_excess_low_n64": -0.02,
        "eval/classifier_excess_high_n64": 0.33,
        "eval/classifier_score_n64": 1.23,
        "eval/classifier_fid_n60": 15.0,
        "eval/classifier_fid_low_n60": 11.7,
        "eval/classifier_fid_high_n60": 19.0,
        "eval/classifier_kid_n64": -0.00123,
        "eval/classifier_copies_n64": 1 / 64,
    },
    "real_metrics": {
        "eval/real_classifier_score_n60": 1.24,
        "eval/real_classifier_fid_n60": 7.0,
        "eval/real_classifier_fid_low_n60": 5.5,
        "eval/real_classifier_fid_high_n60": 9.1,
        "eval/real_classifier_kid_n60": -0.00421,
    },
    "verdict": "64 images made: too few test images to tell how close to real. Their distance exceeds that of real "
    "images by 16 (-2.0 to 33) % of that of noise",
    "grade": "unsure",
    "num_images": 64,
    "num_real_images": 60,
    "fingerprint": "f" * 64,
    "notes": ["only 60 real images"],
    "audit": {
        "copies": {"copies": 0, "num_images": 64, "num_test": 60, "num_near_test": 0},
        "worst": 16 * [{"image": 0, "row": 0, "statistic": 0.5}],
    },
}


def manifest(source: str) -> Any:
    pixels = SimpleNamespace(shape=(8, 8, 1))
    return SimpleNamespace(pixels=pixels, source=source, count=lambda _: 1000, equal_images="")


def compared() -> UtilityResult:
    """The result of `utility` for two classes."""
    figure = Estimate(98.0, 85.0, 100.0)
    gain = Estimate(2.1, 0.9, 3.3)
    known = {
        "sentence": utility_sentence("helps", gain, {"one": gain}, used=9, wanted=9),
        "arms": [
            Arm(name, 9, 0, figure, figure, figure, [figure, figure]) for name in ("augmented", "ratio-0.5", "filled")
        ],
        "classes": [ClassGain(name, 5, 4, gain) for name in ("$\\frac{$", "猫")],
        "chosen": ["ratio-0.5"],
        "seeds": 5,
        "updates": 1000,
        "made": 9,
        "notes": ["Longer ones may gain more."],
    }
    return UtilityResult(**result_of("utility", **known))


def test_intervals_that_end_at_all_images_are_drawn_whole() -> None:
    for axes in plots.utility_figure(compared()).axes:
        for bars in axes.collections:
            assert {tuple(segment[:, 0]) for segment in bars.get_segments()} == {(85, 100)}


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The records of a page with every part, with a long URI."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    sigmas, seen = [1.0, 0.3, 0.1, 0.03], np.arange(100, 1300, 100)
    losses = np.linspace(0.9, 0.2, 12)[:, None] * np.array([0.1, 0.3, 0.6, 1.0])
    table = [{"name": name, "num_images": 51, "agreement": 0.9, "kid": 0.01} for name in ("zero", "one")]
    classes = {"agreement": 0.92, "real_agreement": 0.95, "table": table, "real_table": table, "by_probe": False}
    classes["confusion"] = [[50, 1], [7, 44]]
    candidate = {"images_seen": 1000, "value": 14.0, "digest": "0" * 16}
    candidate |= {"low": 13.0, "high": 15.1}
    selection = {
        "candidates": [candidate],
        "sentence": "it stays",
        "figure": "eval/classifier_fid_n64",
        "uri": "u",
        "notes": ["optimistic"],
    }
    search = {"trials": [{}], "objective_name": "fid", "objective": 12.0, "baseline": 15.5, "images_seen": 4096}
    plot = to_png(plots.selection_figure([candidate], metric="fid", chosen=candidate))
    utility = compared()
    return {
        "title": "digits",
        "mirrored": True,
        "next_step": ("ncsn run --run digits-0123abcd", "this run, trained to its 280,000 images"),
        "run": "digits-0123abcd",
        "finished_at": "2026-01-01 12:00",
        "decision": {"promoted": True, "version": "1", "model": "a-model", "reason": "there was none"},
        "manifest": manifest("Digits."),
        "samples": {"nfe": 5},
        "images_seen": 1200,
        "strengths": "any strength",
        "loss": DsmLossConfig(),
        "lines": {"sample": "64 images"},
        "records": {"sample": SimpleNamespace(seconds=5.0, result={"num_images": 64, "nfe": 5})},
        "answers": answers(EVALUATION, utility.sentence),
        "utility": utility,
        "utility_plot": to_png(plots.utility_figure(utility)),
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
        "copies": "Of 64 images 1 is a copy",
        "copying_hints": ["They are near."],
        "neighbors": neighbors_png(images[:16], images[16:32]),
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


def test_a_page_has_a_section_for_each_part_and_says_what_the_model_has_learned(page) -> None:
    def sections(text: str) -> list[str]:
        return re.findall(r'<section id="(\w+)"', text)

    whole = render("report.html.j2", **page)
    everything = "strip scores neighbors classes utility selection search training timings lineage config"
    assert sections(whole) == everything.split()
    assert len(whole.encode()) < 5_000_000, "MLflow and KFP load the page as a whole"
    assert "default-src 'none'" in whole and "score network (Song" in whole
    missing = dict.fromkeys(
        ("grid", "strip", "decision", "utility", "selection", "search", "loss_plot", "held_out_plot")
    )
    missing |= {"evaluation": EVALUATION | {"classes": None}, "records": {}}
    text = render("report.html.j2", **page | missing | {"loss": ConsistencyLossConfig(kind="consistency")})
    assert sections(text) == ["scores", "neighbors", "timings", "lineage", "config"]
    assert "a consistency model (Song" in text and "Ermon 2019" not in text


def test_hostile_names_stay_text(page) -> None:
    hostile = dict.fromkeys(("title", "run", "config"), HOSTILE) | {"next_step": (HOSTILE, HOSTILE)}
    hostile |= {"manifest": manifest(HOSTILE), "decision": page["decision"] | {"reason": HOSTILE}}
    text = render("report.html.j2", **page | hostile)
    assert text.count("<script>") == 0
    assert text.count("<img") == render("report.html.j2", **page).count("<img")
    assert text.count("{{ 7 * 7 }}") == text.count("&lt;script&gt;alert(1)") > 5


@pytest.fixture(scope="module")
def folder(page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report, and a page that shows it as KFP does."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text(render("report.html.j2", **page))
    (folder / "viewer.html").write_text(VIEWER)
    return folder


@pytest.fixture(params=[(1280, 800), (360, 740)], ids=["desktop", "phone"])
def visit(request: pytest.FixtureRequest, browser: Browser, folder: Path):
    """Opens a page of the folder at one size: its frame, and what it requests and complains of."""
    width, height = request.param
    tabs = []

    def open_page(name: str, *, scheme: str = "light") -> tuple[Frame, list[str], list[str]]:
        tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        tabs.append(tab)
        tab.set_default_timeout(60_000)  # milliseconds, for a busy machine
        requests, complaints = list[str](), list[str]()
        tab.on("request", lambda sent: requests.append(sent.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto((folder / name).as_uri())
        tab.frames[-1].wait_for_load_state()
        return tab.frames[-1], requests, complaints

    yield open_page
    for tab in tabs:
        tab.close()


@pytest.mark.parametrize("name", ["report.html", "viewer.html"])
def test_pictures_are_shown_and_nothing_is_requested(visit, folder: Path, name: str) -> None:
    frame, requests, complaints = visit(name)
    widths = frame.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 8, "grid, real images, strip, neighbors, classes, utility, selection, search"
    assert min(widths) > 0
    drawn = frame.evaluate("[...document.querySelectorAll('.plot svg')].map(s => s.getBoundingClientRect().width)")
    assert len(drawn) == 2 and min(drawn) > 300
    outside = {url for url in requests if not url.startswith("data:")}
    assert outside <= {(folder / "report.html").as_uri(), (folder / "viewer.html").as_uri()}
    assert complaints == []


def test_nothing_is_wider_than_the_screen(visit) -> None:
    frame, *_ = visit("report.html", scheme="dark")
    frame.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert frame.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert frame.evaluate(
        "[...document.querySelectorAll('.scores .number')].every(part => part.scrollWidth <= part.clientWidth)"
    ), "each number has room"
    background, ink = frame.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.plot text')).fill]"
        ".map(color => Math.max(...color.match(/\\d+/g).slice(0, 3).map(Number)))"
    )
    assert background < 60
    assert ink > 180
