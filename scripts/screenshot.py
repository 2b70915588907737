"""Make a screenshot of a report for the docs: `python scripts/screenshot.py REPORT.html PICTURE.png`."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1100, 1500
COLORS = 128  # enough for grays and plots, and a third of the bytes


def main(report: str, picture: str) -> None:
    """Save a screenshot of the top of the report in headless Chromium."""
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root; the page is ours.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=browser_path, args=arguments)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(Path(report).resolve().as_uri())
        screenshot = page.screenshot()
        browser.close()
    Image.open(io.BytesIO(screenshot)).convert("RGB").quantize(COLORS).save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
