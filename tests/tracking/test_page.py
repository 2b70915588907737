"""MLflow's own page in a real browser: links to it open where they should, and pictures are seen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from ncsn.clock import now_ms
from ncsn.report.images import grid_png
from ncsn.runs.history import RATE
from ncsn.tracking import client
from ncsn.tracking.live import LiveMetrics
from ncsn.tracking.mlflow_runs import StepRun, front_page, step_run
from ncsn.tracking.registry import Registration, register

PATIENCE = 60_000
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def tracked(make_config, server) -> StepRun:
    """A training on a real server, with a series of previews as a real one leaves it."""
    config = make_config(f"tracking.uri={server.url}", "tracking.experiment=page")
    with (
        step_run(config, run="seen-by-a-browser", step="train") as train,
        closing(LiveMetrics(train.uri, train.run_id)) as sink,
    ):
        for images_seen in (64, 128):
            sink.log({"train/loss": 1 / images_seen}, images_seen, now_ms())
            sink.log({}, images_seen, now_ms(), png=grid_png(IMAGES))
    return train


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with closing(browser.new_context(viewport={"width": 1400, "height": 900})) as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        yield page


def test_a_link_opens_among_the_runs_of_trainings_and_their_previews_are_a_series(page, server, tracked) -> None:
    page.goto(client.page(server.url, tracked.experiment_id, tracked.run_id))
    expect(page.get_by_role("link", name="Runs", exact=True).first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_role("link", name="Judges")).to_have_count(0)
    page.goto(f"{server.url}/#/experiments/{tracked.experiment_id}/runs/{tracked.run_id}/model-metrics")
    page.get_by_placeholder("Search metric charts").fill("preview")
    slider = page.get_by_role("slider")
    expect(slider).to_have_attribute("aria-valuemax", "128", timeout=PATIENCE)
    slider.press("ArrowRight")
    picture = page.locator("img[src*='train~preview'][src*='step%2B64']")
    expect(picture).to_be_visible(timeout=PATIENCE)
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") >= 64


def test_the_list_of_runs_shows_their_distance_verdict_and_speed(page: Page, server, tracked: StepRun) -> None:
    tracked.parent.log_metrics({"eval/classifier_fid_n512": 12.5, "eval/real_classifier_fid_n512": 1, RATE: 984})
    tracked.parent.set_tags({"eval.verdict": "near"})
    page.goto(server.url + front_page(server.url, run=None))
    for name in ("eval/classifier_fid_n512", RATE, "eval.verdict"):
        expect(page.get_by_role("columnheader", name=name).first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_role("columnheader", name="real_")).to_have_count(0)
    expect(page.get_by_role("row").filter(has_text="near")).to_contain_text(re.compile("12.5.*984"))
    path = front_page(server.url, run="seen-by-a-browser")
    assert server.url + path == client.page(server.url, tracked.experiment_id, tracked.parent_run_id)


def test_the_card_of_a_model_shows_its_pictures(page: Page, server, make_config, checkpoint) -> None:
    card = "# seen\n\n![images](grid.png)\n"
    seen = Registration("seen", checkpoint, card=card, files={"grid.png": grid_png(IMAGES)}, metrics={}, tags={})
    with step_run(make_config(f"tracking.uri={server.url}"), run="seen", step="register") as tracked:
        version = register(tracked, seen)
    page.goto(f"{server.url}/#/models/seen/versions/{version.version}")
    picture = page.locator("img[src*='grid.png']")
    expect(picture).to_be_visible(timeout=PATIENCE)
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 8
