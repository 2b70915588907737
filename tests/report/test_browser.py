"""The report in a browser, as KFP, MLflow and a phone show it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Frame

from ncsn.report.pages import render

SCREENSHOTS = "NCSN_SCREENSHOTS"  # folder for the screenshots; the default is pytest's own
SIZES = {"desktop": (1280, 800), "phone": (360, 740)}
VIEWER = """<!doctype html><style>body { margin: 0 } iframe { border: 0; width: 100vw; height: 100vh }</style>
<iframe sandbox="allow-scripts" src="report.html"></iframe>"""


@dataclass
class Visit:
    frame: Frame
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def folder(page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report, and a page that shows it as KFP does."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text(render(**page))
    (folder / "viewer.html").write_text(VIEWER)
    return folder


@pytest.fixture(params=SIZES)
def visit(request: pytest.FixtureRequest, browser: Browser, folder: Path, tmp_path: Path):
    """Opens a page of the folder at one size, in a dark or light scheme, and takes a screenshot."""
    width, height = SIZES[request.param]
    contexts = []

    def open_page(name: str, *, scheme: str = "light") -> Visit:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(60_000)  # milliseconds, for a busy machine
        seen = Visit(tab.main_frame)
        tab.on("request", lambda sent: seen.requests.append(sent.url))
        tab.on("console", lambda message: seen.complaints.append(message.text))
        tab.on("pageerror", lambda error: seen.complaints.append(str(error)))
        tab.goto((folder / name).as_uri())
        seen.frame = tab.frames[-1]
        seen.frame.wait_for_load_state()
        shots = Path(os.environ.get(SCREENSHOTS, tmp_path))
        shots.mkdir(parents=True, exist_ok=True)
        picture = shots / f"{Path(name).stem}-{request.param}-{scheme}.png"
        # The frame is loaded before it is painted.
        for _ in range(50):
            if len(tab.screenshot(path=picture, full_page=True)) > 10_000:
                break
            tab.wait_for_timeout(100)
        assert picture.stat().st_size > 10_000
        return seen

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", ["report.html", "viewer.html"])
def test_pictures_are_shown_and_nothing_is_requested(visit, folder: Path, page, name: str) -> None:
    seen = visit(name)
    widths = seen.frame.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 7, "grid, real images, strip, neighbors, classes, selection, search"
    assert min(widths) > 0
    plots = seen.frame.evaluate("[...document.querySelectorAll('.plot svg')].map(s => s.getBoundingClientRect().width)")
    assert len(plots) == 2 and min(plots) > 300
    outside = {url for url in seen.requests if not url.startswith("data:")}
    assert outside <= {(folder / "report.html").as_uri(), (folder / "viewer.html").as_uri()}
    assert seen.complaints == []
    sections = seen.frame.evaluate("[...document.querySelectorAll('section')].map(s => s.id)")
    assert sections[-3:] == ["timings", "lineage", "config"]


def test_nothing_is_wider_than_the_screen(visit) -> None:
    seen = visit("report.html", scheme="dark")
    seen.frame.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert seen.frame.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert seen.frame.evaluate(
        "[...document.querySelectorAll('.scores .number')].every(part => part.scrollWidth <= part.clientWidth)"
    ), "each number has room"
    background, ink = seen.frame.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.plot text')).fill]"
        ".map(color => Math.max(...color.match(/\\d+/g).slice(0, 3).map(Number)))"
    )
    assert background < 60
    assert ink > 180
