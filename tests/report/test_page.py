"""The page as text: complete, self-contained, and safe against hostile names."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from ncsn.report.html import MAX_BYTES, render
from ncsn.report.page import Page, Picture, Tile

HOSTILE = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>{{ 7 * 7 }}"


def test_nothing_is_fetched_and_the_size_is_bounded(page: Page) -> None:
    text = render(page)
    assert len(text.encode()) < MAX_BYTES
    sources = re.findall(r"""(?:src|srcset|poster|data|action|xlink:href)\s*=\s*["']([^"']*)""", text)
    assert sources and all(source.startswith(("data:image/", "#")) for source in sources)
    assert re.findall(r"<link|@import|<iframe|<object|<embed|<base", text) == []
    assert all(address.startswith(("#", "data:")) for address in re.findall(r"url\(([^)]*)", text))
    assert "default-src 'none'" in text


def test_a_page_that_is_too_large_is_refused(page: Page) -> None:
    with pytest.raises(ValueError, match=f"{MAX_BYTES:,}"):
        render(replace(page, samples=Picture(bytes(4_000_000), alt="noise")))


def test_hostile_names_stay_text(page: Page) -> None:
    harmless = render(page)
    text = render(
        replace(
            page,
            title=HOSTILE,
            run=HOSTILE,
            lead=[HOSTILE],
            tiles=[Tile(HOSTILE, HOSTILE, HOSTILE)],
            config=HOSTILE,
            timings=[page.timings[0]._replace(step=HOSTILE, result=HOSTILE)],
        )
    )
    assert text.count("<script>") == 0
    assert text.count("<img") == harmless.count("<img")
    assert text.count("{{ 7 * 7 }}") == text.count("&lt;script&gt;alert(1)") > 10


def test_a_run_without_parts_has_no_sections() -> None:
    page = Page(title="digits", run="bare")
    text = render(page)
    assert "<h1>digits</h1>" in text
    assert "<section" not in text and "<img" not in text and '<header class="">' in text
    assert page.headings == []
