"""Pages: the report in HTML, and in Markdown the model card in the registry and the page of a run in KFP.

The report is one file that loads nothing: pictures are `data:` URIs, plots are SVG. A content security policy in the
page forbids every request and every script, whatever its texts contain. Imports no torch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from ncsn.report import words

TEMPLATES = Path(__file__).with_name("templates")
# Digest of the templates, which decide how a page looks.
LOOK = hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(TEMPLATES.iterdir()))).hexdigest()[:16]


def render(template: str, **records: Any) -> str:
    """The page of the records that this file in `templates` names, as HTML or Markdown."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "data_uri": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
        "count": lambda number: f"{number:,.0f}",
        "fields": asdict,
        "quoted": lambda text: json.dumps(text, ensure_ascii=False),  # as Python reads it too
        "short": lambda number: f"{number:g}",
        "plain": plain,
        "svg": Markup,  # drawn by our own plots
    }
    style = Markup((TEMPLATES / "report.css").read_text())  # noqa: S704
    environment.globals |= {"words": words, "markdown_table": markdown_table, "style": style}
    return environment.get_template(template).render(**records)


def plain(text: str) -> str:
    """A text that Markdown, in a table too, shows as it is: no markup, link, HTML or new line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*_\[\]|~]", r"\\\g<0>", text)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts below a head of Markdown."""
    lines = [head, ["---"] * len(head), *(map(plain, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
