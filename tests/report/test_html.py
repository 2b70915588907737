"""The page as text: complete, self-contained, and deaf to hostile names."""

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


def test_a_page_that_would_be_too_large_is_refused(page: Page) -> None:
    huge = replace(page, samples=Picture(b"\x89PNG" + bytes(4_000_000), alt="noise"))
    with pytest.raises(ValueError, match=r"digits-0123abcd.* 5,\d+,\d+ bytes.* 5,000,000"):
        render(huge)


def test_hostile_names_stay_words(page: Page) -> None:
    harmless = render(page)
    text = render(
        replace(
            page,
            title=HOSTILE,
            run=HOSTILE,
            lead=[HOSTILE],
            tiles=[Tile(HOSTILE, HOSTILE, HOSTILE)],
            config=HOSTILE,
            film=replace(page.film, labels=[HOSTILE, *page.film.labels[1:]]),
            timings=[replace(page.timings[0], step=HOSTILE, result=HOSTILE)],
        )
    )
    assert text.count("<script>") == harmless.count("<script>") == 1
    assert text.count("<img") == harmless.count("<img")
    assert text.count("{{ 7 * 7 }}") == text.count("&lt;script&gt;alert(1)") > 10, "each time as it stands"


def test_what_a_run_does_not_have_is_not_on_the_page() -> None:
    text = render(Page(title="digits", run="bare"))
    assert "<h1>digits</h1>" in text
    assert "<section" not in text and "<img" not in text and '<header class="">' in text
    assert Page(title="digits", run="bare").headings == []
