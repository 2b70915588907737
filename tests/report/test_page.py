"""The page as text: self-contained, and safe against hostile names."""

from __future__ import annotations

import re
from types import SimpleNamespace

from ncsn.config.training import ConsistencyLossConfig
from ncsn.report.pages import render

HOSTILE = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>{{ 7 * 7 }}"


def test_nothing_is_fetched_and_the_size_is_bounded(page) -> None:
    text = render(**page)
    assert len(text.encode()) < 5_000_000  # MLflow and KFP load the page as a whole
    sources = re.findall(r"""(?:src|srcset|poster|data|action|xlink:href)\s*=\s*["']([^"']*)""", text)
    assert sources and all(source.startswith(("data:image/", "#")) for source in sources)
    assert re.findall(r"<link|@import|<iframe|<object|<embed|<base|<script", text) == []
    assert all(address.startswith(("#", "data:")) for address in re.findall(r"url\(([^)]*)", text))
    assert "default-src 'none'" in text


def test_hostile_names_stay_text(page) -> None:
    hostile = {
        "title": HOSTILE,
        "next_step": (HOSTILE, HOSTILE),
        "run": HOSTILE,
        "config": HOSTILE,
        "manifest": SimpleNamespace(
            pixels=SimpleNamespace(shape=(8, 8, 1)), source=HOSTILE, count=lambda _: 1000, equal_images=""
        ),
        "decision": page["decision"] | {"reason": HOSTILE},
    }
    text, harmless = render(**page | hostile), render(**page)
    assert text.count("<script>") == 0
    assert text.count("<img") == harmless.count("<img")
    assert text.count("{{ 7 * 7 }}") == text.count("&lt;script&gt;alert(1)") > 5


def test_the_page_says_what_the_model_has_learned(page) -> None:
    text = render(**page | {"loss": ConsistencyLossConfig(kind="consistency")})
    assert "a consistency model (Song" in text and "Ermon 2019" not in text and "score network (Song" in render(**page)


def test_missing_parts_have_no_section(page) -> None:
    missing = dict.fromkeys(("grid", "strip", "decision", "selection", "search", "loss_plot", "held_out_plot"))
    text = render(**page | missing | {"evaluation": page["evaluation"] | {"classes": None}, "records": {}})
    found = re.findall(r'<section id="(\w+)"', text)
    assert found == ["scores", "neighbors", "timings", "lineage", "config"]
    everything = "strip scores neighbors classes selection search training timings lineage config"
    assert re.findall(r'<section id="(\w+)"', render(**page)) == everything.split()
